//! CIPHER: messages are mixtures of whole distributions.

use super::*;

const VOCAB: usize = 64;
/// Messages are of 40 positions.
const LENGTH: usize = 40;

/// Logits of an agent whose lane holds so many positions; the end token is never among the first.
fn logits(agent: u32, held: usize) -> Logits {
    let seed = 1000 * u64::from(agent) + held as u64;
    let mut row = noise(seed, VOCAB, 2.0 + (seed % 7) as f32);
    row[END] = -1.0;
    row
}

/// One position of a message: temperature first, then the most probable 50.
fn position(logits: &[f32]) -> Vec<f64> {
    keep(softmax(logits, 0.7), 50)
}

fn run(rows: fn(u32, usize) -> Logits) -> Seen {
    let config = preset_loop("cipher", 1, 200);
    Recorder::shared(3, VOCAB as u32, &[END], Box::new(rows)).go(&config)
}

/// Checks every lane: the prompt, the messages handed over, and what the agent wrote itself.
fn check(seen: &Seen, rows: fn(u32, usize) -> Logits, lengths: [usize; 2]) {
    let mut said: Vec<Vec<f64>> = Vec::new();
    for agent in 0..3 {
        let prompt: Vec<Fed> = prompt(agent).into_iter().map(Fed::Token).collect();
        let lane = &seen.lanes[&agent];
        assert_eq!(lane[..prompt.len()], prompt);
        let own = lengths.get(agent as usize).copied().unwrap_or(0);
        for _ in 0..own {
            // Behind the prompt and all that was said before, by others and by itself.
            said.push(position(&rows(agent, prompt.len() + said.len())));
        }
        let messages = &lane[prompt.len()..];
        for (at, (fed, expected)) in messages.iter().zip(&said).enumerate() {
            assert_eq!(fed.entries(), 50);
            assert_fed(
                fed,
                expected,
                CLOSE,
                &format!("agent {agent}, position {at}"),
            );
        }
        if agent < 2 {
            assert_eq!(messages.len(), said.len());
            continue;
        }
        // The answer is text, and nothing of it is drawn.
        let answer = &messages[said.len()..];
        assert!(!answer.is_empty());
        for (at, fed) in answer.iter().enumerate() {
            let p = softmax(&rows(2, prompt.len() + said.len() + at), 1.0);
            assert_eq!(*fed, Fed::Token(heaviest(&p) as u32));
        }
    }
    let explicit = seen.events.iter().filter(|e| e.token.is_some());
    assert!(explicit.into_iter().all(|e| e.agent == 2));
}

#[test]
fn two_messages_of_mixtures_then_an_answer_in_text() {
    let seen = run(logits);
    check(&seen, logits, [LENGTH, LENGTH]);
    let handoffs: Vec<_> = seen
        .handoffs
        .iter()
        .map(|h| (h.from, h.to, h.step, h.trigger, h.positions))
        .collect();
    // The step after the last of a message finds it at its end.
    let spent = Trigger::LatentBudget;
    assert_eq!(handoffs, [(0, 1, 40, spent, 40), (1, 2, 81, spent, 80)]);
    assert_eq!(seen.outcome.latent_steps, 80);
}

#[test]
fn a_message_ends_where_the_end_is_certain_and_the_answer_is_text_all_the_same() {
    let rows = |agent: u32, held: usize| match (agent, held - prompt(agent).len()) {
        (0, 3) => with_mass(VOCAB, END, 0.85),
        (0, 5) => with_mass(VOCAB, END, 0.95),
        _ => logits(agent, held),
    };
    let seen = run(rows);
    check(&seen, rows, [5, LENGTH]);
    let triggers: Vec<Trigger> = seen.handoffs.iter().map(|h| h.trigger).collect();
    assert_eq!(triggers, [Trigger::Convergence, Trigger::LatentBudget]);
    // What the first has left over is nobody's.
    assert_eq!(seen.outcome.latent_steps, 45);
}
