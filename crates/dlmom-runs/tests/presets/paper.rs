//! The paper's unified default.

use super::*;

const VOCAB: usize = 64;

/// Two experts, each as sure as its own row makes it.
fn logits(agent: u32, step: usize, doubt: f32) -> Logits {
    let seed = 2 * step as u64 + u64::from(agent);
    let scale = doubt * (0.3 + (hash(seed + 5) % 100) as f32 / 100.0);
    noise(seed, VOCAB, scale)
}

/// Section 4.3 and Appendices B and C on two experts: modes, and what both are fed.
fn derived(config: &LoopConfig, doubt: f32) -> (Vec<Mode>, Vec<Vec<f64>>) {
    let (mut modes, mut fed) = (Vec::new(), Vec::new());
    let (mut switches, mut latent) = (0, 0);
    let mut mode = None;
    for t in 0..config.max_steps as usize {
        let experts = [logits(0, t, doubt), logits(1, t, doubt)];
        let nats = experts.iter().map(|z| nats(&softmax(z, 1.0))).sum::<f64>();
        let h = nats / 2.0 / (VOCAB as f64).ln();
        assert!((h - 0.60).abs() > 1e-6, "too near to call");
        // Entering is paid for together with the exit, and nothing exceeds 10.
        let price = if mode.is_none() { 1 } else { 2 };
        let pays = mode == Some(Latent) || switches + price <= 10;
        let left = config.max_steps as usize - t;
        let wants = h > 0.60 && pays && latent < 40 && left > config.answer_reserve as usize;
        let next = if wants { Latent } else { Explicit };
        switches += usize::from(mode.is_some_and(|before| before != next));
        latent += usize::from(next == Latent);
        mode = Some(next);
        modes.push(next);
        let merged = ties(&experts, 0.1, 1e-6);
        let as_f32: Logits = merged.iter().map(|&v| v as f32).collect();
        let p = softmax(&as_f32, 1.0);
        fed.push(match next {
            Latent => keep(p, 50),
            Explicit => blend(&p, 0.0, heaviest(&p)),
        });
    }
    (modes, fed)
}

fn check(doubt: f32) -> Seen {
    let config = preset_loop("paper", 2, 256);
    assert_eq!(config.answer_reserve, 32);
    let script: Script =
        Box::new(move |agent, held| logits(agent, held - prompt(agent).len(), doubt));
    let seen = Recorder::of_models(2, VOCAB as u32, &[], script).go(&config);
    let (modes, fed) = derived(&config, doubt);
    assert_eq!(seen.modes(), modes);
    for agent in 0..2 {
        let lane = &seen.lanes[&agent][prompt(agent).len()..];
        // The last token is not forwarded any more.
        assert_eq!(lane.len(), 255);
        for (t, (found, expected)) in lane.iter().zip(&fed).enumerate() {
            assert_eq!(found.entries(), if modes[t] == Latent { 50 } else { 1 });
            assert_fed(found, expected, 1e-5, &format!("agent {agent}, step {t}"));
        }
    }
    seen
}

#[test]
fn latent_above_alpha_until_ten_switches_are_spent() {
    for (doubt, first, switches) in [(16.0, Explicit, 10), (13.5, Latent, 9)] {
        let seen = check(doubt);
        let modes = seen.modes();
        assert_eq!(modes[0], first);
        // The tenth would be an entry, and its exit could not be paid for.
        assert_eq!(seen.outcome.switches, switches);
        assert!(modes[100..].iter().all(|&m| m == Explicit));
    }
}

#[test]
fn latent_for_forty_steps_at_most() {
    let seen = check(1.0);
    assert_eq!(seen.outcome.schedule.runs(), [0, 40, 216]);
}
