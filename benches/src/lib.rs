//! Synthetic inputs of the benches: deterministic, without any model.

use dlmom_packet::BeliefPacket;
use dlmom_runtime::{EnsembleInfo, LaneId, MemoryStats, MockBackend, Outcome, Sink};

/// A linear congruential generator, enough for inputs that no result depends on.
#[derive(Debug, Clone)]
pub struct Lcg(u64);

impl Lcg {
    /// A generator with a fixed start.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next value in `[0, 1)`.
    pub fn unit(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 40) as f32 / (1_u64 << 24) as f32
    }
}

/// Logits of `experts` that share most of their preferences, as real ones do: `[experts][vocab]`.
#[must_use]
pub fn logits(experts: usize, vocab: usize, seed: u64) -> Vec<Vec<f32>> {
    let mut rng = Lcg::new(seed);
    // A sum of uniforms is close enough to a bell; every 997th token is a candidate peak.
    let mut bell = || (0..4).map(|_| rng.unit() - 0.5).sum::<f32>() * 3.5;
    let shared: Vec<f32> = (0..vocab)
        .map(|v| bell() + if v % 997 == 13 { 9.0 } else { 0.0 })
        .collect();
    (0..experts)
        .map(|_| shared.iter().map(|&z| z + 0.5 * bell()).collect())
        .collect()
}

/// A packet with `k` entries of falling probability over a vocabulary of `vocab`.
///
/// # Panics
/// For `k` beyond the vocabulary.
#[must_use]
#[expect(clippy::expect_used, reason = "a bench with a wrong input has to stop")]
pub fn packet(k: usize, vocab: u32) -> BeliefPacket {
    let weights: Vec<f32> = (0..k).map(|i| 0.8_f32.powf(i as f32)).collect();
    let sum: f32 = weights.iter().sum();
    let probs = weights.iter().map(|w| w / sum).collect();
    let ids = (0..k as u32).map(|i| (i * 2_654_435) % vocab).collect();
    BeliefPacket::new(ids, probs, 0.98, vocab).expect("a valid packet")
}

/// A backend whose logits cost a copy, so that what remains is the protocol.
#[must_use]
pub fn cheap_backend(agents: usize, vocab: u32, slots: u32, max_len: u32) -> MockBackend {
    let tables = logits(agents, vocab as usize, 7);
    let script = move |lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
        out.copy_from_slice(&tables[lane.agent.index()]);
        // The peak moves with the position, so that entropies are not constant.
        let at = positions.len() % out.len();
        out[at] += 4.0;
        // The end token never leads: every sample spends its budget.
        out[0] = -20.0;
    };
    MockBackend::scripted(agents, vocab, slots, max_len, Box::new(script))
}

/// Counts the steps of finished samples, and keeps the last one's outcome.
#[derive(Default)]
pub struct Last {
    /// Latent and printed steps of all.
    pub steps: u64,
    /// The last outcome.
    pub outcome: Option<Outcome>,
}

impl Sink for Last {
    fn finished(
        &mut self,
        outcome: Outcome,
        _: &EnsembleInfo,
        _: MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.steps += u64::from(outcome.total_steps());
        self.outcome = Some(outcome);
        Ok(())
    }
}
