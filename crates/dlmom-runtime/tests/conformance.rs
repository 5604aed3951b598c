//! The mock keeps the contract, and each way of breaking it is found by the rule that forbids it.

#![expect(clippy::unwrap_used, reason = "test helpers")]

use dlmom_core::{
    Consensus, ConsensusSpec, Controller, ControllerFailure, ControllerSpec, Decision, Force, Gate,
    GateController, Method, Mode, Reason, Start, Views,
};
use dlmom_packet::BeliefPacket;
use dlmom_runtime::conformance::{
    Preset, Rule, Settings, check, check_consensus, check_controller,
};
use dlmom_runtime::{
    AgentId, Align, Backend, BackendError, Embeddings, EnsembleInfo, Feed, LaneId, LaneSpec,
    MemoryStats, MockBackend, ModelId, PromptSource, Readout, Row, SlotId,
};

const EXACT: Settings = Settings {
    tolerance: 0.0,
    preset: Preset::Paper,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    SharedPosition,
    AdvancesOnError,
    LeaksPadding,
    IgnoresMerge,
    TruncatesPackets,
    RemembersAfterReopen,
    ForkAliases,
    TruncateIgnored,
    AcceptsOverflow,
    MovesUnfedAgents,
    IgnoresVersus,
    WrongTargets,
    IgnoresGroups,
    ForgetsHidden,
    KeepsHidden,
}

/// A mock that breaks one rule of the contract by rewriting the calls it passes on.
struct Broken {
    inner: MockBackend,
    fault: Fault,
    fed: Vec<(LaneId, u32)>,
    aliases: Vec<(LaneId, LaneId)>,
    /// Positions asked for, and the limit, of every lane, whatever padding the fault adds.
    own: Vec<(LaneId, u32, u32)>,
}

impl Broken {
    fn new(fault: Fault) -> Self {
        Self {
            inner: MockBackend::hashed(2, 23, 4, 64),
            fault,
            fed: Vec::new(),
            aliases: Vec::new(),
            own: Vec::new(),
        }
    }

    fn length(&self, lane: LaneId) -> u32 {
        self.fed
            .iter()
            .find(|(l, _)| *l == lane)
            .map_or(0, |(_, n)| *n)
    }

    fn grow(&mut self, lane: LaneId, by: u32) {
        match self.fed.iter_mut().find(|(l, _)| *l == lane) {
            Some((_, n)) => *n += by,
            None => self.fed.push((lane, by)),
        }
    }
}

impl Backend for Broken {
    fn info(&self) -> &EnsembleInfo {
        self.inner.info()
    }
    fn encode(&mut self, model: ModelId, source: &PromptSource) -> Result<Vec<u32>, BackendError> {
        self.inner.encode(model, source)
    }
    fn reserve(&mut self, slots: u32, max_len: u32) -> Result<(), BackendError> {
        self.inner.reserve(slots, max_len)
    }
    fn open(&mut self, lanes: &[LaneSpec]) -> Result<(), BackendError> {
        if self.fault == Fault::RemembersAfterReopen
            && lanes.iter().any(|l| self.length(l.lane) > 0)
        {
            return Ok(());
        }
        let wide: Vec<LaneSpec> = lanes
            .iter()
            .map(|l| LaneSpec {
                max_len: if self.fault == Fault::AcceptsOverflow
                    || self.fault == Fault::SharedPosition
                    || self.fault == Fault::LeaksPadding
                {
                    64
                } else {
                    l.max_len
                },
                ..*l
            })
            .collect();
        for lane in lanes {
            self.fed.retain(|(l, _)| *l != lane.lane);
            self.own.retain(|(l, ..)| *l != lane.lane);
            self.own.push((lane.lane, 0, lane.max_len));
        }
        self.inner.open(&wide)
    }
    fn advance(&mut self, rows: &[Row<'_>], out: &mut Readout) -> Result<(), BackendError> {
        let everyone = [AgentId(0), AgentId(1)];
        let pad = vec![1_u32; 64];
        let longest = rows
            .iter()
            .flat_map(|r| r.feeds)
            .map(|(_, f)| f.positions())
            .max()
            .unwrap_or(0);
        let slot_longest = |slot: SlotId| {
            self.fed
                .iter()
                .filter(|(l, _)| l.slot == slot)
                .map(|(_, n)| *n)
                .max()
                .unwrap_or(0)
        };
        let mut tops: Vec<Vec<BeliefPacket>> = Vec::new();
        for row in rows {
            for (_, feed) in row.feeds {
                if let Feed::Packets(packets) = feed {
                    tops.push(
                        packets
                            .iter()
                            .map(|p| BeliefPacket::one_hot(p.top().0, p.vocab()).unwrap())
                            .collect(),
                    );
                }
            }
        }
        let mut tops = tops.iter();
        let mut joined: Vec<Vec<(AgentId, Vec<u32>)>> = Vec::new();
        for row in rows {
            let mut feeds = Vec::new();
            for (agent, feed) in row.feeds {
                if let Feed::Tokens(ids) = feed {
                    let lane = LaneId {
                        slot: row.slot,
                        agent: *agent,
                    };
                    let lead = match self.fault {
                        // Agents of a slot start from the slot's longest lane.
                        Fault::SharedPosition => {
                            (slot_longest(row.slot) - self.length(lane)) as usize
                        }
                        // Shorter rows are padded on the left, and the padding is seen.
                        Fault::LeaksPadding => longest - ids.len(),
                        _ => 0,
                    };
                    let mut all = pad[..lead.min(40)].to_vec();
                    all.extend_from_slice(ids);
                    feeds.push((*agent, all));
                }
            }
            joined.push(feeds);
        }
        let mut feeds: Vec<Vec<(AgentId, Feed<'_>)>> = Vec::new();
        for (row, joined) in rows.iter().zip(&joined) {
            let mut mine = Vec::new();
            for (agent, feed) in row.feeds {
                let changed = match feed {
                    Feed::Tokens(_) => {
                        let ids = joined.iter().find(|(a, _)| a == agent).unwrap();
                        Feed::Tokens(&ids.1)
                    }
                    Feed::Packets(_) if self.fault == Fault::TruncatesPackets => {
                        Feed::Packets(tops.next().unwrap())
                    }
                    other => *other,
                };
                mine.push((*agent, changed));
            }
            feeds.push(mine);
        }
        let changed: Vec<Row<'_>> = rows
            .iter()
            .zip(&feeds)
            .map(|(row, feeds)| {
                let all = feeds.len() == 2 && self.fault == Fault::IgnoresMerge;
                let merge = if all { &everyone[..] } else { row.merge };
                let mut want = row.want;
                match self.fault {
                    Fault::IgnoresVersus => want.versus = want.versus.map(|_| row.slot),
                    Fault::IgnoresGroups => want.groups = None,
                    Fault::ForgetsHidden => want.hidden = false,
                    Fault::KeepsHidden => want.hidden = true,
                    _ => {}
                }
                Row {
                    feeds,
                    merge,
                    want,
                    ..*row
                }
            })
            .collect();
        if matches!(self.fault, Fault::SharedPosition | Fault::LeaksPadding) {
            for row in rows {
                for (agent, feed) in row.feeds {
                    let lane = LaneId {
                        slot: row.slot,
                        agent: *agent,
                    };
                    let own = self.own.iter().find(|(l, ..)| *l == lane);
                    let (_, held, limit) = own.copied().unwrap_or((lane, 0, 0));
                    let wanted = held + feed.positions() as u32;
                    if wanted > limit {
                        return Err(BackendError::Capacity {
                            lane,
                            wanted,
                            limit,
                        });
                    }
                }
            }
        }
        let result = self.inner.advance(&changed, out);
        if result.is_err() && self.fault == Fault::AdvancesOnError {
            // The good rows of the refused call move all the same.
            for row in &changed {
                let _ = self.inner.advance(std::slice::from_ref(row), out);
            }
        }
        result?;
        for row in rows {
            for (agent, feed) in row.feeds {
                let lane = LaneId {
                    slot: row.slot,
                    agent: *agent,
                };
                if let Some((_, held, _)) = self.own.iter_mut().find(|(l, ..)| *l == lane) {
                    *held += feed.positions() as u32;
                }
            }
        }
        for (row, feeds) in rows.iter().zip(&feeds) {
            for (agent, feed) in feeds {
                self.grow(
                    LaneId {
                        slot: row.slot,
                        agent: *agent,
                    },
                    feed.positions() as u32,
                );
            }
        }
        match self.fault {
            Fault::MovesUnfedAgents => {
                for row in rows {
                    for agent in everyone {
                        if !row.feeds.iter().any(|(a, _)| *a == agent) {
                            let feed = [(agent, Feed::Tokens(&[1]))];
                            let merge = [agent];
                            let extra = Row {
                                slot: row.slot,
                                feeds: &feed,
                                merge: &merge,
                                consensus: row.consensus,
                                want: row.want,
                            };
                            let mut ignored = Readout::default();
                            let _ = self.inner.advance(&[extra], &mut ignored);
                        }
                    }
                }
            }
            Fault::ForkAliases => {
                let aliases = self.aliases.clone();
                for (from, to) in aliases {
                    let _ = self.inner.fork(to, from, None);
                }
            }
            Fault::WrongTargets => {
                for row in &mut out.rows {
                    row.read.target_logprobs.reverse();
                    row.read.target_logprobs.pop();
                }
            }
            _ => {}
        }
        Ok(())
    }
    fn hidden(&mut self, lanes: &[LaneId], align: Align) -> Result<Embeddings, BackendError> {
        self.inner.hidden(lanes, align)
    }
    fn fork(&mut self, from: LaneId, to: LaneId, upto: Option<u32>) -> Result<(), BackendError> {
        self.inner.fork(from, to, upto)?;
        if self.fault == Fault::ForkAliases {
            self.aliases.push((from, to));
        }
        Ok(())
    }
    fn truncate(&mut self, lane: LaneId, len: u32) -> Result<(), BackendError> {
        if self.fault == Fault::TruncateIgnored && len < 20 {
            return Ok(());
        }
        self.inner.truncate(lane, len)
    }
    fn close(&mut self, slots: &[SlotId]) {
        if self.fault != Fault::RemembersAfterReopen {
            self.inner.close(slots);
        }
    }
    fn memory(&self) -> MemoryStats {
        self.inner.memory()
    }
}

#[test]
fn the_mock_keeps_the_contract_exactly() {
    for preset in [Preset::Mean, Preset::Paper] {
        for agents in [1, 2, 3] {
            let mut mock = MockBackend::hashed(agents, 23, 4, 24);
            check(
                &mut mock,
                Settings {
                    tolerance: 0.0,
                    preset,
                },
            )
            .unwrap();
        }
    }
}

#[test]
fn a_backend_too_small_for_the_kit_is_told_so() {
    let mut mock = MockBackend::hashed(1, 23, 2, 24);
    assert_eq!(check(&mut mock, EXACT).unwrap_err().rule, Rule::SetUp);
}

#[test]
fn every_broken_mock_is_found_by_the_rule_it_breaks() {
    let cases = [
        (
            Fault::SharedPosition,
            vec![Rule::OwnPositions, Rule::UnfedAgentsStay],
        ),
        (Fault::LeaksPadding, vec![Rule::RowsAreIndependent]),
        (
            Fault::IgnoresMerge,
            vec![Rule::MergeIsObeyed, Rule::OwnPositions],
        ),
        (Fault::TruncatesPackets, vec![Rule::PacketsAreMixed]),
        (
            Fault::RemembersAfterReopen,
            vec![Rule::SplitPrefill, Rule::ReopenForgets],
        ),
        (Fault::ForkAliases, vec![Rule::ForkCopies]),
        (Fault::TruncateIgnored, vec![Rule::TruncateForgets]),
        (Fault::AcceptsOverflow, vec![Rule::CapacityIsEnforced]),
        (
            Fault::MovesUnfedAgents,
            vec![Rule::UnfedAgentsStay, Rule::OwnPositions],
        ),
        (Fault::IgnoresVersus, vec![Rule::VersusMeasures]),
        (Fault::WrongTargets, vec![Rule::TargetsAgree]),
        (Fault::IgnoresGroups, vec![Rule::GroupsMergeApart]),
        (Fault::ForgetsHidden, vec![Rule::HiddenIsKept, Rule::SetUp]),
        (Fault::KeepsHidden, vec![Rule::HiddenIsKept]),
        (Fault::AdvancesOnError, vec![Rule::ErrorsDoNotAdvance]),
    ];
    for (fault, rules) in cases {
        let found = check(&mut Broken::new(fault), EXACT);
        let rule = found.as_ref().err().map(|v| v.rule);
        assert!(
            rule.is_some_and(|r| rules.contains(&r)),
            "{fault:?}: {found:?}"
        );
    }
}

#[test]
fn the_wrapper_without_a_fault_passes() {
    check(&mut Broken::new(Fault::None), EXACT).unwrap();
}

/// Counts how often it was asked, and lets the count into the result.
struct Forgetful(std::sync::atomic::AtomicU32);

impl Consensus for Forgetful {
    fn name(&self) -> &'static str {
        "forgetful"
    }
    fn merge(&self, views: &Views<'_>, out: &mut [f32]) -> bool {
        let calls = self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        out.copy_from_slice(views.centred[0]);
        out[0] += calls as f32;
        true
    }
}

struct NotANumber;

impl Consensus for NotANumber {
    fn name(&self) -> &'static str {
        "nan"
    }
    fn merge(&self, _: &Views<'_>, out: &mut [f32]) -> bool {
        out.fill(0.0);
        out[3] = f32::NAN;
        true
    }
}

#[test]
fn operators_are_pure_and_finite() {
    check_consensus(&ConsensusSpec::paper()).unwrap();
    for method in [
        Method::Mean,
        Method::Arith,
        Method::Poe,
        Method::Best,
        Method::Mixture,
    ] {
        check_consensus(&ConsensusSpec::of(method)).unwrap();
    }
    let rule = |consensus: &dyn Consensus| check_consensus(consensus).unwrap_err().rule;
    assert_eq!(rule(&Forgetful(0.into())), Rule::ConsensusIsPure);
    assert_eq!(rule(&NotANumber), Rule::ConsensusIsFinite);
}

/// Wrong in one of several ways.
struct Wrong(u32, u32);
impl Controller for Wrong {
    fn observe(&mut self, _: f64, _: Option<Force>) -> Result<Decision, ControllerFailure> {
        self.1 += 1;
        match self.0 {
            0 => Err("no idea".into()),
            1 => Ok(Decision {
                mode: Mode::Latent,
                switched: true,
                reason: Reason::Always,
            }),
            _ => Ok(Decision {
                mode: Mode::Latent,
                switched: false,
                reason: Reason::Always,
            }),
        }
    }
    fn switches(&self) -> u32 {
        0
    }
    fn latent_steps(&self) -> u32 {
        self.1
    }
    fn mode(&self) -> Option<Mode> {
        Some(Mode::Latent)
    }
}

#[test]
fn controllers_replay_and_count() {
    let spec = |gate| ControllerSpec {
        gate,
        w: Some(4),
        alpha: 0.5,
        cap: 9,
        min_dwell_latent: 2,
        max_latent_steps: 20,
        start: Start::Latent,
        ..ControllerSpec::default()
    };
    for gate in [
        Gate::Threshold,
        Gate::Trend,
        Gate::Reference,
        Gate::LatentThenExplicit,
        Gate::AlwaysLatent,
        Gate::AlwaysExplicit,
    ] {
        check_controller(&mut || Ok(Box::new(GateController::new(&spec(gate))?))).unwrap();
    }
    let rule = |kind| {
        check_controller(&mut || Ok(Box::new(Wrong(kind, 0))))
            .unwrap_err()
            .rule
    };
    assert_eq!(rule(0), Rule::SetUp);
    assert_eq!(rule(1), Rule::ControllerCounts);
    assert_eq!(rule(2), Rule::ControllerCounts, "latent although forced");
    // A controller that knows which run it is in does not replay.
    let mut made = 0;
    let violation = check_controller(&mut || {
        made += 1;
        let mut spec = spec(Gate::Threshold);
        spec.alpha = 0.3 * f64::from(made);
        Ok(Box::new(GateController::new(&spec)?))
    });
    assert_eq!(violation.unwrap_err().rule, Rule::ControllerReplays);
}
