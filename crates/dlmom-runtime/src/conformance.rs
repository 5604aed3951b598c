//! The contract of [`Backend`] as executable rules. The mock, deliberately broken mocks and real backends all run it.

use std::fmt;
use std::sync::LazyLock;

use dlmom_core::{
    Consensus, ConsensusSpec, Controller, ControllerFailure, Decision, Force, Method, Mode, Views,
};
use dlmom_packet::{BeliefPacket, Meta};

use crate::backend::{
    Align, Backend, BackendError, Feed, Groups, LaneSpec, Payload, ReadRow, Readout, Row, Want,
};
use crate::ids::{AgentId, LaneId, SlotId};
use crate::link::{Uplink, WireEncoding};

/// One rule of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A prompt fed at once and token by token gives the same readout.
    SplitPrefill,
    /// A packet with one entry is that token.
    OneHotIsToken,
    /// A packet with two entries is neither of its tokens.
    PacketsAreMixed,
    /// Agents of a slot have their own positions, whatever the lengths of their prompts.
    OwnPositions,
    /// A row's readout does not depend on its batch mates or on its slot.
    RowsAreIndependent,
    /// Agents that are not fed do not move.
    UnfedAgentsStay,
    /// Consensus meets exactly the agents of `merge`, in its order.
    MergeIsObeyed,
    /// A refused call advances no lane.
    ErrorsDoNotAdvance,
    /// A lane never passes its limit, and the refusal advances nothing.
    CapacityIsEnforced,
    /// A reopened slot remembers nothing.
    ReopenForgets,
    /// A forked lane continues as its donor, and both go on separately.
    ForkCopies,
    /// A truncated lane continues as if the rest had never been fed.
    TruncateForgets,
    /// Target log-likelihoods are those of the merged distribution.
    TargetsAgree,
    /// A row compared with itself has no divergence; with another row it has some.
    VersusMeasures,
    /// Groups are merged by themselves and send packets up; entropies and flags stay the agents'.
    GroupsMergeApart,
    /// A hidden state that was asked for can be read and fed; one that was not is refused. Backends without hidden states
    /// say that they have none.
    HiddenIsKept,
    /// Unknown slots, ids beyond the vocabulary, rows named twice and empty feeds are refused.
    NonsenseIsRefused,
    /// The same rows merge to the same bits, whatever was merged before.
    ConsensusIsPure,
    /// Finite rows merge to finite values.
    ConsensusIsFinite,
    /// Fresh controllers fed the same entropies decide the same.
    ControllerReplays,
    /// Switches and latent steps are those of the decisions; the first is no switch; forced steps are explicit.
    ControllerCounts,
    /// A slot's failure in numbers is a flag; set-up calls succeed.
    SetUp,
}

/// A rule that a backend broke, with what was seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// What was seen.
    pub seen: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.seen)
    }
}

impl std::error::Error for Violation {}

/// How the kit runs.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Largest difference of two entropies or probabilities that are meant to be equal: 0 for an
    /// exact backend.
    pub tolerance: f64,
    /// Consensus the rules are tried with.
    pub preset: Preset,
}

/// Consensus operators of the kit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Mean of the centred logits.
    Mean,
    /// The paper's TIES.
    Paper,
}

const TOP: u32 = 4;

static MEAN: LazyLock<ConsensusSpec> = LazyLock::new(|| ConsensusSpec::of(Method::Mean));
static PAPER: LazyLock<ConsensusSpec> = LazyLock::new(ConsensusSpec::paper);

struct Kit<'b> {
    backend: &'b mut dyn Backend,
    settings: Settings,
    consensus: &'static ConsensusSpec,
    agents: Vec<AgentId>,
    vocab: u32,
}

/// Runs every rule on a backend with at least 3 slots of at least 24 positions, and a vocabulary of at least 8 tokens.
///
/// # Errors
/// The first rule broken.
pub fn check(backend: &mut dyn Backend, settings: Settings) -> Result<(), Violation> {
    let info = backend.info().clone();
    let vocab = info.models.iter().map(|m| m.vocab).min().unwrap_or(0);
    if info.slots < 3 || info.max_len < 24 || vocab < 8 || info.agents.is_empty() {
        return Err(Violation {
            rule: Rule::SetUp,
            seen: format!(
                "{} slots of {} positions, {vocab} tokens, {} agents: too small for the kit",
                info.slots,
                info.max_len,
                info.agents.len()
            ),
        });
    }
    let consensus = match settings.preset {
        Preset::Mean => &*MEAN,
        Preset::Paper => &*PAPER,
    };
    let mut kit = Kit {
        backend,
        settings,
        consensus,
        agents: (0..info.agents.len() as u32).map(AgentId).collect(),
        vocab,
    };
    // Agents with different vocabularies share a backend in lanes of their own, never a consensus.
    let one_vocabulary = info
        .models
        .iter()
        .all(|m| m.fingerprint == info.models[0].fingerprint && m.vocab == info.models[0].vocab);
    for agent in kit.agents.clone() {
        kit.single(agent)?;
    }
    if kit.agents.len() > 1 {
        kit.own_positions()?;
        kit.unfed_agents_stay()?;
        if one_vocabulary {
            kit.merge_is_obeyed()?;
            kit.groups_merge_apart()?;
        }
    }
    let slots: Vec<SlotId> = (0..info.slots).map(SlotId).collect();
    kit.backend.close(&slots);
    Ok(())
}

fn broken(rule: Rule, seen: impl Into<String>) -> Violation {
    Violation {
        rule,
        seen: seen.into(),
    }
}

/// Centred rows of `experts` over `vocab` tokens, a fixed function of `salt`.
fn centred_rows(experts: usize, vocab: usize, salt: usize) -> Vec<Vec<f32>> {
    (0..experts)
        .map(|expert| {
            let raw: Vec<f32> = (0..vocab)
                .map(|v| (((v * 31 + expert * 17 + salt * 7) % 53) as f32 - 26.0) * 0.25)
                .collect();
            let mean = raw.iter().sum::<f32>() / vocab as f32;
            raw.into_iter().map(|z| z - mean).collect()
        })
        .collect()
}

/// Runs the rules of a consensus operator, a user's own included.
///
/// # Errors
/// The first rule broken; [`Rule::SetUp`] with the operator's own failure.
pub fn check_consensus(consensus: &dyn Consensus) -> Result<(), Violation> {
    let merge = |experts: usize, vocab: usize, salt: usize| {
        let rows = centred_rows(experts, vocab, salt);
        let centred: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let stats: Vec<_> = centred.iter().map(|row| dlmom_core::stats(row)).collect();
        let views = Views {
            centred: &centred,
            stats: &stats,
            stream: None,
        };
        let mut out = vec![f32::NAN; vocab];
        consensus.merge(&views, &mut out);
        match consensus.take_failure() {
            Some(error) => Err(broken(Rule::SetUp, error.to_string())),
            None => Ok(out),
        }
    };
    for (experts, vocab) in [(2, 8), (3, 491), (2, 1024)] {
        let first = merge(experts, vocab, 1)?;
        if let Some(at) = first.iter().position(|z| !z.is_finite()) {
            return Err(broken(
                Rule::ConsensusIsFinite,
                format!("token {at} of {vocab} merges to {}", first[at]),
            ));
        }
        merge(experts, vocab, 2)?;
        let again = merge(experts, vocab, 1)?;
        let same = first
            .iter()
            .zip(&again)
            .all(|(a, b)| a.to_bits() == b.to_bits());
        if !same {
            return Err(broken(
                Rule::ConsensusIsPure,
                format!("{experts} rows of {vocab} tokens merge differently the second time"),
            ));
        }
    }
    Ok(())
}

/// Runs the rules of a controller, a user's own included; `make` gives a fresh one.
///
/// # Errors
/// The first rule broken; [`Rule::SetUp`] with the controller's own failure.
pub fn check_controller(
    make: &mut dyn FnMut() -> Result<Box<dyn Controller>, ControllerFailure>,
) -> Result<(), Violation> {
    let failed = |error: ControllerFailure| broken(Rule::SetUp, error.to_string());
    let entropies: Vec<f64> = (0..64_u32)
        .map(|step| f64::from((step * 37 + 11) % 64) / 64.0)
        .collect();
    let force = |step: usize| match step {
        20 => Some(Force::EosCertain),
        60.. => Some(Force::AnswerReserve),
        _ => None,
    };
    let mut runs: Vec<Vec<Decision>> = Vec::new();
    for _ in 0..2 {
        let mut controller = make().map_err(failed)?;
        let (mut switches, mut latent, mut last) = (0, 0, None);
        let mut decisions = Vec::new();
        for (step, &entropy) in entropies.iter().enumerate() {
            let decision = controller.observe(entropy, force(step)).map_err(failed)?;
            let switched = last.is_some_and(|mode| mode != decision.mode);
            switches += u32::from(switched);
            latent += u32::from(decision.mode == Mode::Latent);
            last = Some(decision.mode);
            let counted = (
                controller.switches(),
                controller.latent_steps(),
                controller.mode(),
            );
            if decision.switched != switched || counted != (switches, latent, last) {
                return Err(broken(
                    Rule::ControllerCounts,
                    format!(
                        "step {step}: counts {counted:?}, decisions make {switches} switches and {latent} latent steps"
                    ),
                ));
            }
            if force(step).is_some() && decision.mode == Mode::Latent {
                return Err(broken(
                    Rule::ControllerCounts,
                    format!("step {step} is latent although explicit mode was forced"),
                ));
            }
            decisions.push(decision);
        }
        runs.push(decisions);
    }
    match (0..entropies.len()).find(|&step| runs[0][step] != runs[1][step]) {
        Some(step) => Err(broken(
            Rule::ControllerReplays,
            format!("step {step}: {:?}, then {:?}", runs[0][step], runs[1][step]),
        )),
        None => Ok(()),
    }
}

fn row<'a>(slot: u32, feeds: &'a [(AgentId, Feed<'a>)], merge: &'a [AgentId]) -> Row<'a> {
    let want = Want {
        top: TOP,
        ..Want::default()
    };
    Row {
        slot: SlotId(slot),
        feeds,
        merge,
        // The kit puts its own in before it calls.
        consensus: &*MEAN,
        want,
    }
}

impl Kit<'_> {
    fn set_up<T>(result: Result<T, BackendError>) -> Result<T, Violation> {
        result.map_err(|e| Violation {
            rule: Rule::SetUp,
            seen: e.to_string(),
        })
    }

    fn open(&mut self, slot: u32, max_len: u32) -> Result<(), Violation> {
        let lanes: Vec<LaneSpec> = self
            .agents
            .iter()
            .map(|&agent| LaneSpec {
                lane: LaneId {
                    slot: SlotId(slot),
                    agent,
                },
                max_len,
            })
            .collect();
        Self::set_up(self.backend.open(&lanes))
    }

    fn call(&mut self, rows: &[Row<'_>]) -> Result<Vec<ReadRow>, BackendError> {
        let mut out = Readout::default();
        let rows: Vec<Row<'_>> = rows
            .iter()
            .map(|row| Row {
                consensus: self.consensus,
                ..*row
            })
            .collect();
        self.backend.advance(&rows, &mut out)?;
        Ok(out.rows)
    }

    fn ok(&mut self, rows: &[Row<'_>]) -> Result<Vec<ReadRow>, Violation> {
        let read = Self::set_up(self.call(rows))?;
        if read.len() != rows.len() {
            return Err(Violation {
                rule: Rule::SetUp,
                seen: format!("{} rows read for {} asked", read.len(), rows.len()),
            });
        }
        Ok(read)
    }

    fn tokens(&mut self, slot: u32, agent: AgentId, ids: &[u32]) -> Result<ReadRow, Violation> {
        let feeds = [(agent, Feed::Tokens(ids))];
        let merge = [agent];
        let mut read = self.ok(&[row(slot, &feeds, &merge)])?;
        Ok(read.remove(0))
    }

    /// Feeds the ids that [`Kit::id`] gives for `ns`.
    fn feed(&mut self, slot: u32, agent: AgentId, ns: &[u32]) -> Result<ReadRow, Violation> {
        let ids: Vec<u32> = ns.iter().map(|&n| self.id(n)).collect();
        self.tokens(slot, agent, &ids)
    }

    fn distance(a: &ReadRow, b: &ReadRow) -> f64 {
        let mut worst = 0.0_f64;
        if a.read.entropies.len() != b.read.entropies.len() || a.read.finite != b.read.finite {
            return f64::INFINITY;
        }
        for (x, y) in a.read.entropies.iter().zip(&b.read.entropies) {
            worst = worst.max((x - y).abs());
        }
        worst = worst.max((a.read.merged_entropy - b.read.merged_entropy).abs());
        for (&id, &p) in a.read.ids.iter().zip(&a.read.probs) {
            let other = b.read.ids.iter().position(|&o| o == id);
            let q = other.map_or(0.0, |at| b.read.probs[at]);
            // Near-ties at the edge of the list may be ordered differently within the tolerance.
            let edge = b.read.probs.last().copied().unwrap_or(0.0);
            let gap = if other.is_some() { p - q } else { p - edge };
            worst = worst.max(f64::from(gap.abs()));
        }
        worst
    }

    fn same(&self, rule: Rule, a: &ReadRow, b: &ReadRow, what: &str) -> Result<(), Violation> {
        let distance = Self::distance(a, b);
        if distance <= self.settings.tolerance {
            Ok(())
        } else {
            Err(Violation {
                rule,
                seen: format!("{what}: readouts differ by {distance:.3e}"),
            })
        }
    }

    fn differ(&self, rule: Rule, a: &ReadRow, b: &ReadRow, what: &str) -> Result<(), Violation> {
        if Self::distance(a, b) > self.settings.tolerance {
            Ok(())
        } else {
            Err(Violation {
                rule,
                seen: format!("{what}: readouts are equal"),
            })
        }
    }

    fn prompt(&self, length: u32, salt: u32) -> Vec<u32> {
        (0..length).map(|i| self.id(i * 5 + salt * 3)).collect()
    }

    /// Ids spread over the vocabulary from its end: the first ones are often special or byte
    /// tokens, whose embeddings are hardly trained and hard to tell apart.
    fn id(&self, n: u32) -> u32 {
        let span = self.vocab - 1;
        let step = (span / 9).max(1);
        self.vocab - 1 - (n * step) % span
    }

    fn mixture(&self, ids: [u32; 2]) -> Result<BeliefPacket, Violation> {
        BeliefPacket::new(ids.to_vec(), vec![0.6, 0.4], 0.9, self.vocab).map_err(|e| Violation {
            rule: Rule::SetUp,
            seen: e.to_string(),
        })
    }

    fn single(&mut self, agent: AgentId) -> Result<(), Violation> {
        let prompt = self.prompt(7, agent.0);
        self.open(0, 24)?;
        let whole = self.tokens(0, agent, &prompt)?;
        self.open(0, 24)?;
        let mut split = self.tokens(0, agent, &prompt[..1])?;
        for id in &prompt[1..] {
            split = self.tokens(0, agent, &[*id])?;
        }
        self.same(
            Rule::SplitPrefill,
            &whole,
            &split,
            "7 tokens at once and one by one",
        )?;
        self.open(0, 24)?;
        self.tokens(0, agent, &prompt[..3])?;
        let split = self.tokens(0, agent, &prompt[3..])?;
        self.same(Rule::SplitPrefill, &whole, &split, "7 tokens as 3 and 4")?;

        self.packets(agent, &prompt)?;
        self.mates(agent, &prompt)?;
        self.errors(agent, &prompt)?;
        self.lanes(agent, &prompt)?;
        self.scores(agent, &prompt)?;
        self.hidden_is_kept(agent, &prompt)
    }

    fn packets(&mut self, agent: AgentId, prompt: &[u32]) -> Result<(), Violation> {
        let merge = [agent];
        let mut reads = Vec::new();
        let hot = BeliefPacket::one_hot(self.id(3), self.vocab).map_err(|e| Violation {
            rule: Rule::SetUp,
            seen: e.to_string(),
        })?;
        let mixed = self.mixture([self.id(3), self.id(5)])?;
        let (three, five) = ([self.id(3)], [self.id(5)]);
        let feeds = [
            Feed::Tokens(&three),
            Feed::Packets(std::slice::from_ref(&hot)),
            Feed::Packets(std::slice::from_ref(&mixed)),
            Feed::Tokens(&five),
        ];
        for feed in feeds {
            self.open(0, 24)?;
            self.tokens(0, agent, prompt)?;
            let feeds = [(agent, feed)];
            reads.push(self.ok(&[row(0, &feeds, &merge)])?.remove(0));
        }
        self.same(
            Rule::OneHotIsToken,
            &reads[0],
            &reads[1],
            "token 3 and its one-hot packet",
        )?;
        self.differ(
            Rule::PacketsAreMixed,
            &reads[2],
            &reads[0],
            "0.6/0.4 mixture and token 3",
        )?;
        self.differ(
            Rule::PacketsAreMixed,
            &reads[2],
            &reads[3],
            "0.6/0.4 mixture and token 5",
        )
    }

    fn mates(&mut self, agent: AgentId, prompt: &[u32]) -> Result<(), Violation> {
        let merge = [agent];
        let mixed = self.mixture([self.id(2), self.id(6)])?;
        let soft = [(agent, Feed::Packets(std::slice::from_ref(&mixed)))];
        self.open(1, 24)?;
        let alone_prefill = self.tokens(1, agent, prompt)?;
        let alone = self.ok(&[row(1, &soft, &merge)])?.remove(0);

        let long = self.prompt(13, 5);
        let short = self.prompt(2, 9);
        for slot in 0..3 {
            self.open(slot, 24)?;
        }
        let f0 = [(agent, Feed::Tokens(&long))];
        let f1 = [(agent, Feed::Tokens(prompt))];
        let f2 = [(agent, Feed::Tokens(&short))];
        let together = self.ok(&[
            row(0, &f0, &merge),
            row(1, &f1, &merge),
            row(2, &f2, &merge),
        ])?;
        self.same(
            Rule::RowsAreIndependent,
            &alone_prefill,
            &together[1],
            "prefill with mates",
        )?;
        let four = [self.id(4)];
        let hard = [(agent, Feed::Tokens(&four))];
        let together = self.ok(&[
            row(0, &hard, &merge),
            row(1, &soft, &merge),
            row(2, &hard, &merge),
        ])?;
        self.same(
            Rule::RowsAreIndependent,
            &alone,
            &together[1],
            "a soft step with mates",
        )?;

        self.open(2, 24)?;
        self.open(0, 24)?;
        let f2 = [(agent, Feed::Tokens(prompt))];
        let f0 = [(agent, Feed::Tokens(&long))];
        self.ok(&[row(2, &f2, &merge), row(0, &f0, &merge)])?;
        let mixed_call = self.ok(&[row(2, &soft, &merge)])?;
        self.same(
            Rule::RowsAreIndependent,
            &alone,
            &mixed_call[0],
            "another slot",
        )
    }

    fn errors(&mut self, agent: AgentId, prompt: &[u32]) -> Result<(), Violation> {
        let merge = [agent];
        self.open(0, 24)?;
        self.tokens(0, agent, prompt)?;
        let next = self.feed(0, agent, &[4])?;

        self.open(0, 24)?;
        self.open(1, 24)?;
        self.tokens(0, agent, prompt)?;
        let four = [self.id(4)];
        let good = [(agent, Feed::Tokens(&four))];
        let vocab = [self.vocab.max(u32::MAX - 1)];
        let bad = [(agent, Feed::Tokens(&vocab))];
        let empty = [(agent, Feed::Tokens(&[]))];
        let refused: [(&str, Vec<Row<'_>>); 5] = [
            (
                "an id beyond the vocabulary",
                vec![row(0, &good, &merge), row(1, &bad, &merge)],
            ),
            (
                "a slot named twice",
                vec![row(0, &good, &merge), row(0, &good, &merge)],
            ),
            (
                "an empty feed",
                vec![row(0, &good, &merge), row(1, &empty, &merge)],
            ),
            (
                "an unknown slot",
                vec![row(0, &good, &merge), row(u32::MAX - 1, &good, &merge)],
            ),
            ("a merge of nobody", vec![row(0, &good, &[])]),
        ];
        for (what, rows) in refused {
            match self.call(&rows) {
                Err(BackendError::Poisoned(_)) => return Ok(()),
                Err(_) => {}
                Ok(_) => {
                    return Err(Violation {
                        rule: Rule::NonsenseIsRefused,
                        seen: format!("{what} was accepted"),
                    });
                }
            }
        }
        let after = self.feed(0, agent, &[4])?;
        self.same(
            Rule::ErrorsDoNotAdvance,
            &next,
            &after,
            "a step after five refused calls",
        )?;

        self.open(2, 9)?;
        self.tokens(2, agent, prompt)?;
        let thrice = [self.id(4); 3];
        let three = [(agent, Feed::Tokens(&thrice))];
        if self.call(&[row(2, &three, &merge)]).is_ok() {
            return Err(Violation {
                rule: Rule::CapacityIsEnforced,
                seen: "a lane of 9 took in 10 positions".into(),
            });
        }
        let after = self.feed(2, agent, &[4])?;
        self.same(
            Rule::CapacityIsEnforced,
            &next,
            &after,
            "a step after a refused overflow",
        )
    }

    fn lanes(&mut self, agent: AgentId, prompt: &[u32]) -> Result<(), Violation> {
        let lane = |slot: u32| LaneId {
            slot: SlotId(slot),
            agent,
        };
        self.open(0, 24)?;
        self.tokens(0, agent, prompt)?;
        let four = self.feed(0, agent, &[4])?;
        let five = self.feed(0, agent, &[5])?;

        self.open(0, 24)?;
        self.tokens(0, agent, &self.prompt(11, 3))?;
        self.backend.close(&[SlotId(0)]);
        self.open(0, 24)?;
        self.tokens(0, agent, prompt)?;
        let reopened = self.feed(0, agent, &[4])?;
        self.same(Rule::ReopenForgets, &four, &reopened, "a slot used before")?;

        self.open(1, 24)?;
        Self::set_up(
            self.backend
                .fork(lane(0), lane(1), Some(prompt.len() as u32)),
        )?;
        let forked = self.feed(1, agent, &[4])?;
        self.same(Rule::ForkCopies, &four, &forked, "the first step of a fork")?;
        self.feed(1, agent, &[6])?;
        let donor = self.feed(0, agent, &[5])?;
        self.same(
            Rule::ForkCopies,
            &five,
            &donor,
            "the donor after the fork went its own way",
        )?;

        self.feed(0, agent, &[6, 2])?;
        Self::set_up(self.backend.truncate(lane(0), prompt.len() as u32 + 1))?;
        let again = self.feed(0, agent, &[5])?;
        self.same(
            Rule::TruncateForgets,
            &five,
            &again,
            "a step after truncation",
        )?;
        if self.backend.truncate(lane(0), 23).is_ok() {
            return Err(Violation {
                rule: Rule::TruncateForgets,
                seen: "a lane was truncated to more than it holds".into(),
            });
        }
        Ok(())
    }

    fn scores(&mut self, agent: AgentId, prompt: &[u32]) -> Result<(), Violation> {
        let merge = [agent];
        let other = self.prompt(5, 8);
        self.open(0, 24)?;
        self.open(1, 24)?;
        let first = [(agent, Feed::Tokens(prompt))];
        let second = [(agent, Feed::Tokens(&other))];
        let all: Vec<u32> = (0..self.vocab).collect();
        let want = Want {
            top: TOP,
            targets: Some(&all),
            ..Want::default()
        };
        let myself = Want {
            versus: Some(SlotId(0)),
            ..want
        };
        let rows = [
            Row {
                slot: SlotId(0),
                feeds: &first,
                merge: &merge,
                consensus: self.consensus,
                want: myself,
            },
            Row {
                slot: SlotId(1),
                feeds: &second,
                merge: &merge,
                consensus: self.consensus,
                want: myself,
            },
        ];
        let read = self.ok(&rows)?;
        let logprobs = &read[0].read.target_logprobs;
        let entropy: f64 = logprobs.iter().map(|l| -l.exp() * l).sum();
        let slack = self.settings.tolerance.max(1e-5);
        let model = self.backend.info().model_of(agent).map_or(0, |m| m.vocab);
        if logprobs.len() != all.len()
            || (model == self.vocab && (entropy - read[0].read.merged_entropy).abs() > slack)
        {
            return Err(Violation {
                rule: Rule::TargetsAgree,
                seen: format!(
                    "{} log-likelihoods of entropy {entropy}, readout says {}",
                    logprobs.len(),
                    read[0].read.merged_entropy
                ),
            });
        }
        let wrong = |seen: String| Violation {
            rule: Rule::VersusMeasures,
            seen,
        };
        let own = read[0]
            .versus
            .ok_or_else(|| wrong("no divergence".into()))?;
        let cross = read[1]
            .versus
            .ok_or_else(|| wrong("no divergence".into()))?;
        if own.kl.abs() > slack || (own.cosine - 1.0).abs() > slack || cross.kl <= slack {
            return Err(wrong(format!("own {own:?}, cross {cross:?}")));
        }
        Ok(())
    }

    fn hidden_is_kept(&mut self, agent: AgentId, prompt: &[u32]) -> Result<(), Violation> {
        let wrong = |seen: String| broken(Rule::HiddenIsKept, seen);
        let lane = LaneId {
            slot: SlotId(0),
            agent,
        };
        let merge = [agent];
        let feeds = [(agent, Feed::Tokens(prompt))];
        let want = Want {
            top: TOP,
            hidden: true,
            ..Want::default()
        };
        self.open(0, 24)?;
        let asked = Row {
            want,
            ..row(0, &feeds, &merge)
        };
        if matches!(self.call(&[asked]), Err(BackendError::Unsupported(_))) {
            return Ok(());
        }
        let width = self
            .backend
            .info()
            .model_of(agent)
            .map_or(0, |m| m.hidden as usize);
        let mut seen = Vec::new();
        for align in [Align::Identity, Align::Ridge] {
            let found = Self::set_up(self.backend.hidden(&[lane], align))?;
            if found.values.len() != width || found.values.iter().any(|x| !x.is_finite()) {
                return Err(wrong(format!(
                    "{} values of a hidden state of width {width}",
                    found.values.len()
                )));
            }
            seen.push(found);
        }
        // What is fed by name is what is fed by value.
        let named = [(
            agent,
            Feed::Hidden {
                from: lane,
                align: Align::Identity,
            },
        )];
        let first = self.ok(&[row(0, &named, &merge)])?.remove(0);
        self.open(0, 24)?;
        self.tokens(0, agent, prompt)?;
        let payload = Payload::Embed {
            values: seen[0].values.clone(),
            hidden: seen[0].hidden,
        };
        let valued = [(agent, Feed::Payload(&payload))];
        let second = self.ok(&[row(0, &valued, &merge)])?.remove(0);
        self.same(
            Rule::HiddenIsKept,
            &first,
            &second,
            "a hidden state fed by lane and by value",
        )?;
        self.open(0, 24)?;
        self.tokens(0, agent, prompt)?;
        if self.backend.hidden(&[lane], Align::Identity).is_ok() {
            return Err(wrong("a hidden state that nobody asked to keep".into()));
        }
        Ok(())
    }

    fn groups_merge_apart(&mut self) -> Result<(), Violation> {
        let wrong = |seen: String| broken(Rule::GroupsMergeApart, seen);
        let (a, b) = (self.agents[0], self.agents[1]);
        let prompt = self.prompt(6, 2);
        let merge = [a, b];
        let feeds = [(a, Feed::Tokens(&prompt)), (b, Feed::Tokens(&prompt))];
        let uplink = Uplink {
            k: Some(TOP),
            encoding: WireEncoding::F32,
            meta: Meta {
                fingerprint: 1,
                step: 0,
            },
        };
        let together = [vec![0, 1]];
        let apart = [vec![1], vec![0]];
        let mut reads = Vec::new();
        for members in [None, Some(&together[..]), Some(&apart[..])] {
            self.open(0, 24)?;
            let want = Want {
                top: TOP,
                groups: members.map(|members| Groups {
                    members,
                    consensus: self.consensus,
                    uplink,
                }),
                ..Want::default()
            };
            let asked = Row {
                want,
                ..row(0, &feeds, &merge)
            };
            reads.push(self.ok(&[asked])?.remove(0));
        }
        let [plain, one, two] = &reads[..] else {
            return Ok(());
        };
        if one.read.ids != plain.read.ids {
            return Err(wrong(format!(
                "one group of all sends up {:?}, consensus reads {:?}",
                one.read.ids, plain.read.ids
            )));
        }
        for (read, groups) in [(one, 1), (two, 2)] {
            let pairs = || read.read.entropies.iter().zip(&plain.read.entropies);
            let apart = pairs().any(|(a, b)| (a - b).abs() > self.settings.tolerance);
            if apart || read.read.entropies.len() != plain.read.entropies.len() {
                return Err(wrong(format!(
                    "{groups} groups: entropies {:?} of the agents became {:?}",
                    plain.read.entropies, read.read.entropies
                )));
            }
            if read.uplink_bytes == 0 {
                return Err(wrong(format!("{groups} groups sent up no byte")));
            }
        }
        Ok(())
    }

    fn own_positions(&mut self) -> Result<(), Violation> {
        let (a, b) = (self.agents[0], self.agents[1]);
        let short = self.prompt(3, 1);
        let long = self.prompt(11, 4);
        self.open(0, 24)?;
        let alone = self.tokens(0, a, &short)?;
        let alone_next = self.feed(0, a, &[4])?;
        self.open(0, 24)?;
        let merge = [a];
        let feeds = [(a, Feed::Tokens(&short)), (b, Feed::Tokens(&long))];
        let both = self.ok(&[row(0, &feeds, &merge)])?.remove(0);
        self.same(
            Rule::OwnPositions,
            &alone,
            &both,
            "a short prompt beside a long one",
        )?;
        let four = [self.id(4)];
        let feeds = [(a, Feed::Tokens(&four)), (b, Feed::Tokens(&four))];
        let next = self.ok(&[row(0, &feeds, &merge)])?.remove(0);
        self.same(Rule::OwnPositions, &alone_next, &next, "the step after it")?;

        self.open(0, 24)?;
        self.tokens(0, b, &long)?;
        self.tokens(0, a, &short)?;
        let next = self.feed(0, a, &[4])?;
        self.same(
            Rule::OwnPositions,
            &alone_next,
            &next,
            "the other agent fed first",
        )
    }

    fn unfed_agents_stay(&mut self) -> Result<(), Violation> {
        let (a, b) = (self.agents[0], self.agents[1]);
        let prompt = self.prompt(6, 2);
        self.open(0, 24)?;
        self.tokens(0, a, &prompt)?;
        let next = self.feed(0, a, &[4])?;
        self.open(0, 24)?;
        self.tokens(0, a, &prompt)?;
        self.tokens(0, b, &prompt)?;
        self.feed(0, b, &[2])?;
        self.feed(0, b, &[3])?;
        let after = self.feed(0, a, &[4])?;
        self.same(
            Rule::UnfedAgentsStay,
            &next,
            &after,
            "a step after the other moved alone",
        )
    }

    fn merge_is_obeyed(&mut self) -> Result<(), Violation> {
        let (a, b) = (self.agents[0], self.agents[1]);
        let prompt = self.prompt(6, 2);
        let feeds = [(a, Feed::Tokens(&prompt)), (b, Feed::Tokens(&prompt))];
        let mut reads = Vec::new();
        for merge in [&[a][..], &[b], &[a, b], &[b, a]] {
            self.open(0, 24)?;
            reads.push(self.ok(&[row(0, &feeds, merge)])?.remove(0));
        }
        self.open(0, 24)?;
        let alone = self.tokens(0, a, &prompt)?;
        self.same(
            Rule::MergeIsObeyed,
            &alone,
            &reads[0],
            "merge [a] and a alone",
        )?;
        self.differ(
            Rule::MergeIsObeyed,
            &reads[0],
            &reads[1],
            "merge [a] and merge [b]",
        )?;
        self.differ(
            Rule::MergeIsObeyed,
            &reads[0],
            &reads[2],
            "merge [a] and merge [a, b]",
        )?;
        let forward = &reads[2].read.entropies;
        let backward: Vec<f64> = reads[3].read.entropies.iter().rev().copied().collect();
        let apart = forward
            .iter()
            .zip(&backward)
            .map(|(x, y)| (x - y).abs())
            .fold(0.0_f64, f64::max);
        if forward.len() != 2 || apart > self.settings.tolerance {
            return Err(Violation {
                rule: Rule::MergeIsObeyed,
                seen: format!("entropies {forward:?} for [a, b], {backward:?} for [b, a] reversed"),
            });
        }
        Ok(())
    }
}
