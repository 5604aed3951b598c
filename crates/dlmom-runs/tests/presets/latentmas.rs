//! LatentMAS: hidden states between agents in a row.

use super::*;

const VOCAB: usize = 64;

fn logits(agent: u32, held: usize) -> Logits {
    let seed = 1000 * u64::from(agent) + held as u64;
    let mut row = noise(seed, VOCAB, 4.0);
    row[END] = -1.0;
    row
}

fn run(rows: fn(u32, usize) -> Logits) -> Seen {
    let config = preset_loop("latentmas", 1, 120);
    Recorder::shared(4, VOCAB as u32, &[END], Box::new(rows)).go(&config)
}

/// Checks that every lane is the one before it, the agent's prompt, and so many states; then the answer's draws.
fn check(seen: &Seen, rows: fn(u32, usize) -> Logits, states: [usize; 3]) {
    let mut cache: Vec<Fed> = Vec::new();
    for agent in 0..4 {
        cache.extend(prompt(agent).into_iter().map(Fed::Token));
        for _ in 0..states.get(agent as usize).copied().unwrap_or(0) {
            // The first is the state behind the prompt's last position; none is sampled or skipped.
            cache.push(Fed::State {
                agent,
                held: cache.len(),
                align: Align::Ridge,
            });
        }
        let lane = &seen.lanes[&agent];
        assert_eq!(lane[..cache.len()], cache, "agent {agent}");
        assert!(agent == 3 || lane.len() == cache.len());
    }
    let mut unlikely = 0;
    let tokens: Vec<u32> = seen.events.iter().filter_map(|e| e.token).collect();
    for (at, &token) in tokens.iter().enumerate() {
        let held = cache.len() + at;
        let allowed = top_p(softmax(&rows(3, held), 0.6), 0.95);
        assert!(allowed[token as usize] > 0.0, "{token} was cut off");
        unlikely += usize::from(token as usize != heaviest(&allowed));
        if let Some(fed) = seen.lanes[&3].get(held) {
            assert_eq!(*fed, Fed::Token(token));
        }
    }
    assert!(unlikely * 3 > tokens.len());
    assert_eq!(tokens, seen.outcome.tokens);
}

#[test]
fn ten_aligned_states_behind_every_prompt_on_one_growing_cache() {
    let seen = run(logits);
    check(&seen, logits, [10, 10, 10]);
    let handoffs: Vec<_> = seen
        .handoffs
        .iter()
        .map(|h| (h.from, h.to, h.step, h.trigger))
        .collect();
    let spent = Trigger::LatentBudget;
    let expected = [(0, 1, 10, spent), (1, 2, 21, spent), (2, 3, 32, spent)];
    assert_eq!(handoffs, expected);
    // The cache grows by prompt and states exactly, and is handed over whole.
    let positions: Vec<u32> = seen.handoffs.iter().map(|h| h.positions).collect();
    assert_eq!(positions, [3 + 10, 3 + 4 + 20, 3 + 4 + 5 + 30]);
    assert_eq!(seen.outcome.latent_steps, 30);
}

#[test]
fn a_role_stops_early_at_a_certain_end_and_the_answer_is_text_all_the_same() {
    let rows = |agent: u32, held: usize| match (agent, held) {
        // The fifth step of the second.
        (1, 21) => with_mass(VOCAB, END, 0.95),
        _ => logits(agent, held),
    };
    let seen = run(rows);
    check(&seen, rows, [10, 4, 10]);
    assert_eq!(seen.handoffs[1].trigger, Trigger::Convergence);
    assert_eq!(seen.outcome.latent_steps, 24);
}
