//! `--batch-size auto`: tries row counts once and keeps the one with the best throughput.

use std::time::Instant;

use dlmom_core::ConsensusSpec;
use dlmom_packet::BeliefPacket;
use dlmom_runtime::{
    AgentId, Backend, BackendError, Feed, LaneId, LaneSpec, Readout, Row, SlotId, Want,
};

/// Row counts tried, in order.
const CANDIDATES: [u32; 5] = [8, 16, 32, 64, 128];
/// Timed steps per candidate, after one that is not timed.
const STEPS: u32 = 6;
/// Gain in rows a second below which a larger batch is not worth its memory.
const WORTH: f64 = 1.08;

/// What the probe found.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Probe {
    /// The choice.
    pub(crate) rows: u32,
    /// Rows a second of every candidate tried.
    pub(crate) rates: Vec<(u32, f64)>,
}

/// Finds the row count with the best throughput for lanes of `max_len` positions and packets of `k` entries.
///
/// # Errors
/// Of the smallest candidate; a larger one that fails (no memory) ends the search.
pub(crate) fn probe(
    backend: &mut dyn Backend,
    prompts: &[Vec<Vec<u32>>],
    max_len: u32,
    k: u32,
    consensus: &ConsensusSpec,
) -> Result<Probe, BackendError> {
    let mut rates: Vec<(u32, f64)> = Vec::new();
    for rows in CANDIDATES {
        match rate(backend, prompts, max_len, rows, k, consensus) {
            Ok(rate) => {
                let best = rates.last().map_or(0.0, |(_, r)| *r);
                rates.push((rows, rate));
                if rate < best * WORTH {
                    break;
                }
            }
            Err(error) if rates.is_empty() => return Err(error),
            Err(BackendError::Cancelled(source)) => return Err(BackendError::Cancelled(source)),
            Err(_) => break,
        }
    }
    let mut choice = rates[0];
    for &(rows, rate) in &rates[1..] {
        if rate > choice.1 * WORTH {
            choice = (rows, rate);
        }
    }
    Ok(Probe {
        rows: choice.0,
        rates,
    })
}

fn rate(
    backend: &mut dyn Backend,
    prompts: &[Vec<Vec<u32>>],
    max_len: u32,
    rows: u32,
    k: u32,
    consensus: &ConsensusSpec,
) -> Result<f64, BackendError> {
    backend.reserve(rows, max_len)?;
    let info = backend.info().clone();
    let agents: Vec<AgentId> = (0..info.agents.len() as u32).map(AgentId).collect();
    let slots: Vec<SlotId> = (0..rows).map(SlotId).collect();
    let mut out = Readout::default();
    for &slot in &slots {
        let prompt = &prompts[slot.index() % prompts.len()];
        let lanes: Vec<LaneSpec> = agents
            .iter()
            .map(|&agent| LaneSpec {
                lane: LaneId { slot, agent },
                max_len,
            })
            .collect();
        backend.open(&lanes)?;
        let feeds: Vec<(AgentId, Feed<'_>)> = agents
            .iter()
            .zip(prompt)
            .map(|(&agent, ids)| (agent, Feed::Tokens(ids)))
            .collect();
        let want = Want {
            top: 1,
            ..Want::default()
        };
        backend.advance(
            &[Row {
                slot,
                feeds: &feeds,
                merge: &agents,
                consensus,
                want,
            }],
            &mut out,
        )?;
    }
    let vocab = info.model_of(agents[0]).map_or(1, |m| m.vocab);
    let k = k.min(vocab);
    let packet = BeliefPacket::new(
        (0..k).collect(),
        vec![1.0 / k as f32; k as usize],
        1.0,
        vocab,
    )
    .map_err(|e| BackendError::Invalid(e.to_string()))?;
    let feeds: Vec<(AgentId, Feed<'_>)> = agents
        .iter()
        .map(|&agent| (agent, Feed::Packets(std::slice::from_ref(&packet))))
        .collect();
    let want = Want {
        top: k,
        ..Want::default()
    };
    let batch: Vec<Row<'_>> = slots
        .iter()
        .map(|&slot| Row {
            slot,
            feeds: &feeds,
            merge: &agents,
            consensus,
            want,
        })
        .collect();
    backend.advance(&batch, &mut out)?;
    let started = Instant::now();
    for _ in 0..STEPS {
        backend.advance(&batch, &mut out)?;
    }
    let rate = f64::from(STEPS * rows) / started.elapsed().as_secs_f64();
    backend.close(&slots);
    Ok(rate)
}
