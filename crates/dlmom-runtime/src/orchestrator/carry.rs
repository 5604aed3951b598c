//! A transcript on its way from one agent of a chain to the next.

use dlmom_packet::{BeliefPacket, Meta, Scalar, Transcript};

use super::decide::End;
use super::{Backend, RunError, Session, Stop};
use crate::backend::Payload;
use crate::controls::{HandoffControl, shuffled};
use crate::link::{Link, LinkError, LinkMessage, WireEncoding};
use crate::sample::{Active, NextFeed, Thought};

/// A transcript as the receiver decoded it.
pub(super) struct Carried {
    pub(super) feeds: Vec<NextFeed>,
    pub(super) positions: u32,
    pub(super) bytes: u64,
}

/// Messages of one kind, one after another, each with its step.
enum Span {
    Packets(Vec<BeliefPacket>),
    Vectors(Vec<(u32, Vec<f32>)>),
    Distributions(Vec<(u32, Vec<f32>)>),
}

/// What a link has to know about the models.
struct Terms {
    vocab: u32,
    fingerprint: u64,
    hidden: u32,
    scalar: Scalar,
    encoding: WireEncoding,
}

impl Session {
    /// All that was thought so far, through the link to the agent at a place, by the handoff's control.
    pub(super) fn transcript(
        &mut self,
        backend: &mut dyn Backend,
        active: &Active,
        to: usize,
    ) -> Result<Carried, End> {
        let plan = &self.plans[active.plan];
        let config = &plan.config;
        let fact = &self.facts[active.current];
        let terms = Terms {
            vocab: fact.vocab,
            fingerprint: fact.fingerprint,
            // Vectors that stand for packets are the receiver's; others pass between agents of one model.
            hidden: self.facts[to].hidden,
            scalar: self.facts[to].scalar,
            encoding: config.link.encoding,
        };
        let mut thoughts = match config.controls.handoff {
            HandoffControl::Real => active.thoughts.clone(),
            HandoffControl::None => Vec::new(),
            HandoffControl::Zero => active
                .thoughts
                .iter()
                .map(|t| Thought::Embed(t.step(), vec![0.0; terms.hidden as usize]))
                .collect(),
            HandoffControl::Shuffle => shuffled(active.thoughts.len(), &active.stream())
                .into_iter()
                .map(|at| active.thoughts[at].clone())
                .collect(),
            HandoffControl::Other => self.of_another_item(backend, active)?,
        };
        let kept = matches!(
            config.controls.handoff,
            HandoffControl::Real | HandoffControl::Shuffle
        );
        if let Some(Payload::Embed { values: mean, .. }) = plan.filler.get(to)
            && kept
        {
            for thought in &mut thoughts {
                if let Thought::Embed(_, values) = thought {
                    values.clone_from(mean);
                }
            }
        }
        let mut carried = Carried {
            feeds: Vec::new(),
            positions: 0,
            bytes: 0,
        };
        for span in spans(thoughts) {
            let (feed, bytes) = send(&mut *self.link, span, &terms)
                .map_err(|e| End::Sample(Stop::Backend, e.to_string()))?;
            carried.positions += feed.positions(0);
            carried.bytes += bytes;
            carried.feeds.push(feed);
        }
        Ok(carried)
    }

    /// Another item's packets in the form in which this configuration's messages travel.
    fn of_another_item(
        &self,
        backend: &mut dyn Backend,
        active: &Active,
    ) -> Result<Vec<Thought>, End> {
        let donor = self
            .donors
            .pick(&active.job.key.item_id, &active.stream())
            .ok_or_else(|| {
                End::Sample(
                    Stop::Backend,
                    crate::controls::ControlError::NoDonor.to_string(),
                )
            })?;
        let fact = &self.facts[active.current];
        let packets = donor.packets.iter().cloned();
        let steps = 0_u32..;
        Ok(match self.plans[active.plan].config.link.message {
            LinkMessage::Belief => steps
                .zip(packets)
                .map(|(step, packet)| Thought::Packet(step, packet))
                .collect(),
            LinkMessage::Logits => steps
                .zip(packets)
                .map(|(step, packet)| {
                    let mut probs = vec![0.0_f32; fact.vocab as usize];
                    for (id, p) in packet.iter() {
                        probs[id as usize] = p;
                    }
                    Thought::Dense(step, probs)
                })
                .collect(),
            LinkMessage::Embed | LinkMessage::Hidden => {
                let embeddings = backend
                    .embed(fact.model, &donor.packets)
                    .map_err(|source| {
                        End::Run(RunError::Backend {
                            context: "another item's transcript".into(),
                            source,
                        })
                    })?;
                let rows = embeddings
                    .values
                    .chunks_exact(embeddings.hidden.max(1) as usize);
                steps
                    .zip(rows)
                    .map(|(step, row)| Thought::Embed(step, row.to_vec()))
                    .collect()
            }
        })
    }
}

/// Neighbours of one kind joined.
fn spans(thoughts: Vec<Thought>) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for thought in thoughts {
        match (thought, spans.last_mut()) {
            (Thought::Packet(_, packet), Some(Span::Packets(packets))) => packets.push(packet),
            (Thought::Packet(_, packet), _) => spans.push(Span::Packets(vec![packet])),
            (Thought::Embed(step, values), Some(Span::Vectors(rows))) => rows.push((step, values)),
            (Thought::Embed(step, values), _) => spans.push(Span::Vectors(vec![(step, values)])),
            (Thought::Dense(step, probs), Some(Span::Distributions(rows))) => {
                rows.push((step, probs));
            }
            (Thought::Dense(step, probs), _) => {
                spans.push(Span::Distributions(vec![(step, probs)]));
            }
        }
    }
    spans
}

/// What a receiver decodes of a span, and its length in bytes.
fn send(link: &mut dyn Link, span: Span, terms: &Terms) -> Result<(NextFeed, u64), LinkError> {
    let &Terms {
        vocab,
        fingerprint,
        hidden,
        scalar,
        encoding,
    } = terms;
    let meta = |step| Meta { fingerprint, step };
    let mut total = 0;
    let feed = match span {
        Span::Packets(packets) => {
            let mut transcript = Transcript::new(vocab, fingerprint)?;
            // Steps of a transcript rise, whatever the order of what it holds.
            for (step, packet) in (0_u32..).zip(packets) {
                transcript.push(step, packet)?;
            }
            let (received, bytes) = link.transcript(&transcript, encoding)?;
            total += bytes as u64;
            NextFeed::Packets(received)
        }
        Span::Vectors(rows) => {
            let mut values = Vec::with_capacity(rows.len() * hidden as usize);
            for (step, row) in rows {
                let (received, bytes) = link.embed(&row, meta(step), scalar)?;
                total += bytes as u64;
                values.extend(received);
            }
            NextFeed::Payload(Payload::Embed { values, hidden })
        }
        Span::Distributions(rows) => {
            let mut probs = Vec::with_capacity(rows.len() * vocab as usize);
            for (step, row) in rows {
                let (received, bytes) = link.dense(&row, meta(step), encoding)?;
                total += bytes as u64;
                probs.extend(received);
            }
            NextFeed::Payload(Payload::Dense { probs, vocab })
        }
    };
    Ok((feed, total))
}
