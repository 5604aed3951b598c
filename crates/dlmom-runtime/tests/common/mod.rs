//! Configurations, jobs, a sink that keeps everything, and a backend that notes what its lanes hold.
#![allow(
    dead_code,
    clippy::expect_used,
    clippy::panic,
    clippy::allow_attributes,
    reason = "shared by several test binaries"
)]

use std::collections::BTreeMap;

use dlmom_core::{
    AlphaUnit, ControllerSpec, Decision, Gate, Mode, RowReadout, SamplingSpec, Start,
};
use dlmom_packet::{BeliefPacket, Encoding, Transcript};
use dlmom_runtime::{
    AgentId, Align, Backend, BackendError, Embeddings, EnsembleInfo, Feed, Handoff, HandoffRecord,
    Hooks, Job, JobKey, LaneId, LaneSpec, LoopConfig, MemoryStats, Message, MockBackend, ModelId,
    Outcome, Payload, PromptSource, Readout, Role, Row, RunError, RunOptions, Sequential, Sink,
    SlotId, StepEvent, Topology, run_all,
};

pub(crate) const VOCAB: u32 = 23;

/// Lanes long enough for whatever the tests feed.
pub(crate) const ROOM: u32 = 160;

pub(crate) fn controller(gate: Gate, alpha: f64) -> ControllerSpec {
    ControllerSpec {
        gate,
        w: Some(3),
        alpha,
        alpha_unit: AlphaUnit::Normalized,
        cap: -1,
        max_latent_steps: 6,
        start: Start::Gate,
        ..ControllerSpec::default()
    }
}

pub(crate) fn config(gate: Gate, alpha: f64) -> LoopConfig {
    LoopConfig {
        k: 5,
        controller: controller(gate, alpha),
        sampling: SamplingSpec::GREEDY,
        max_steps: 24,
        answer_reserve: 4,
        ..LoopConfig::default()
    }
}

/// Sampled, so that draws matter.
pub(crate) const SAMPLED: SamplingSpec = SamplingSpec {
    temperature: 0.8,
    top_p: 0.95,
    ..SamplingSpec::GREEDY
};

pub(crate) fn sequential(names: &[&str], handoff: Handoff) -> Sequential {
    Sequential {
        roles: names.iter().map(|name| Role::named(*name)).collect(),
        handoff,
        max_handoffs: None,
        on_failure: None,
    }
}

/// Generalist and Specialist, the Generalist latent up to its share.
pub(crate) fn pair(handoff: Handoff) -> LoopConfig {
    with_chain(
        config(Gate::AlwaysLatent, 0.5),
        sequential(&["generalist", "specialist"], handoff),
    )
}

pub(crate) fn with_chain(config: LoopConfig, chain: Sequential) -> LoopConfig {
    LoopConfig {
        topology: Topology::Sequential(chain),
        ..config
    }
}

/// The chain of a configuration, to be changed.
pub(crate) fn chain_of(config: &mut LoopConfig) -> &mut Sequential {
    match &mut config.topology {
        Topology::Sequential(chain) => chain,
        other => panic!("{other:?} is no chain"),
    }
}

/// Agents that share the first model.
pub(crate) fn one_model(mut mock: MockBackend) -> MockBackend {
    mock.info_mut().agents.fill(ModelId(0));
    mock
}

/// An entropy near 0: one token leads by 12 nats.
pub(crate) fn sure(token: usize, out: &mut [f32]) {
    out.fill(0.0);
    out[token] = 12.0;
}

/// Every agent has a prompt of its own, of its own length.
pub(crate) fn prompt(index: u32, agent: u32) -> Vec<u32> {
    (0..3 + (index + 2 * agent) % 4)
        .map(|i| 1 + (i * 7 + index * 3 + agent * 5) % (VOCAB - 1))
        .collect()
}

pub(crate) fn job(index: u32, agents: u32) -> Job {
    Job {
        key: JobKey {
            item_id: format!("item-{index}"),
            seed: 0,
            sample: 0,
        },
        prompts: (0..agents)
            .map(|agent| PromptSource::Tokens {
                ids: prompt(index, agent),
            })
            .collect(),
        trace: true,
        config: 0,
        schedule: None,
        rival: None,
    }
}

pub(crate) fn jobs(count: u32, agents: u32) -> Vec<Job> {
    (0..count).map(|index| job(index, agents)).collect()
}

pub(crate) fn message(role: &str, content: &str) -> Message {
    Message {
        role: role.into(),
        content: content.into(),
    }
}

/// What a [`StepEvent`] said.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) item: String,
    pub(crate) step: u32,
    pub(crate) agent: u32,
    pub(crate) decision: Decision,
    pub(crate) entropy: f64,
    pub(crate) observed: f64,
    pub(crate) read: RowReadout,
    pub(crate) packet: Option<BeliefPacket>,
    pub(crate) token: Option<u32>,
    pub(crate) injected: Vec<u32>,
    pub(crate) noise_kl: Option<f64>,
    pub(crate) noise_js: f64,
    pub(crate) bytes: (u64, u64),
    pub(crate) model: String,
}

impl Event {
    pub(crate) fn is_latent(&self) -> bool {
        self.decision.mode == Mode::Latent
    }

    /// The packet that was read, before anything was done to it.
    pub(crate) fn raw(&self) -> BeliefPacket {
        BeliefPacket::new(
            self.read.ids.clone(),
            self.read.probs.clone(),
            self.read.mass,
            VOCAB,
        )
        .expect("a readout is a packet")
    }
}

/// Whether a text answers its item.
pub(crate) type Judge = Box<dyn FnMut(&str) -> bool>;

/// Keeps everything a session says.
#[derive(Default)]
pub(crate) struct Collect {
    pub(crate) outcomes: Vec<Outcome>,
    pub(crate) events: Vec<Event>,
    pub(crate) handoffs: Vec<(JobKey, HandoffRecord)>,
    /// Texts that were judged.
    pub(crate) asked: Vec<String>,
    /// `step`, `handoff` and `finished`, in order.
    pub(crate) order: Vec<&'static str>,
    /// By default every text is an answer.
    pub(crate) judge: Option<Judge>,
}

impl Sink for Collect {
    fn finished(
        &mut self,
        outcome: Outcome,
        _: &EnsembleInfo,
        _: MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.order.push("finished");
        self.outcomes.push(outcome);
        Ok(())
    }

    fn step(&mut self, event: &StepEvent<'_>) {
        self.order.push("step");
        self.events.push(Event {
            item: event.key.item_id.clone(),
            step: event.step,
            agent: event.agent,
            decision: event.decision,
            entropy: event.entropy,
            observed: event.observed,
            read: event.read.clone(),
            packet: event.packet.cloned(),
            token: event.token,
            injected: event.injected.to_vec(),
            noise_kl: event.noise_kl,
            noise_js: event.noise_js,
            bytes: event.bytes,
            model: event.model.name.clone(),
        });
    }

    fn handoff(&mut self, key: &JobKey, record: &HandoffRecord) {
        self.order.push("handoff");
        self.handoffs.push((key.clone(), record.clone()));
    }

    fn answered(&mut self, _: &JobKey, text: &str) -> bool {
        self.asked.push(text.to_owned());
        self.judge.as_mut().is_none_or(|judge| judge(text))
    }
}

impl Collect {
    pub(crate) fn judging(judge: impl FnMut(&str) -> bool + 'static) -> Self {
        Self {
            judge: Some(Box::new(judge)),
            ..Self::default()
        }
    }

    /// The only outcome.
    pub(crate) fn one(&self) -> &Outcome {
        assert_eq!(self.outcomes.len(), 1);
        &self.outcomes[0]
    }

    pub(crate) fn latent(&self) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(|e| e.is_latent())
    }
}

/// Runs jobs into a sink, outcomes sorted by key.
pub(crate) fn run_into(
    mut sink: Collect,
    backend: &mut dyn Backend,
    configs: &[LoopConfig],
    hooks: Hooks,
    jobs: Vec<Job>,
) -> Result<Collect, RunError> {
    let options = RunOptions::default();
    run_all(
        backend,
        configs,
        &options,
        hooks,
        &mut jobs.into_iter(),
        &mut sink,
    )?;
    sink.outcomes.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(sink)
}

pub(crate) fn go_with(
    backend: &mut dyn Backend,
    config: &LoopConfig,
    jobs: Vec<Job>,
    hooks: Hooks,
) -> Collect {
    let configs = std::slice::from_ref(config);
    run_into(Collect::default(), backend, configs, hooks, jobs).expect("the run succeeds")
}

pub(crate) fn go(backend: &mut dyn Backend, config: &LoopConfig, jobs: Vec<Job>) -> Collect {
    go_with(backend, config, jobs, Hooks::default())
}

/// Why a configuration is refused.
pub(crate) fn refused(backend: &mut dyn Backend, config: &LoopConfig, hooks: Hooks) -> RunError {
    run_into(
        Collect::default(),
        backend,
        std::slice::from_ref(config),
        hooks,
        Vec::new(),
    )
    .err()
    .expect("refused")
}

/// An outcome without what the clock decides.
pub(crate) fn timeless(outcome: &Outcome) -> Outcome {
    Outcome {
        latency_s: 0.0,
        started_at: 0.0,
        ..outcome.clone()
    }
}

pub(crate) fn timeless_all(outcomes: &[Outcome]) -> Vec<Outcome> {
    outcomes.iter().map(timeless).collect()
}

/// What one position of a lane was fed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fed {
    Token(u32),
    Packet(BeliefPacket),
    Embed(Vec<f32>),
    Dense(Vec<f32>),
}

pub(crate) fn fed_tokens(ids: &[u32]) -> Vec<Fed> {
    ids.iter().map(|&id| Fed::Token(id)).collect()
}

pub(crate) fn fed_packets<'a>(packets: impl IntoIterator<Item = &'a BeliefPacket>) -> Vec<Fed> {
    packets.into_iter().cloned().map(Fed::Packet).collect()
}

pub(crate) fn lane(slot: u32, agent: u32) -> LaneId {
    LaneId {
        slot: SlotId(slot),
        agent: AgentId(agent),
    }
}

/// A mock that notes what its lanes were fed and what was asked of it.
pub(crate) struct Recorder {
    pub(crate) inner: MockBackend,
    lanes: BTreeMap<LaneId, Vec<Fed>>,
    /// What lanes held when they were reopened or closed, in order.
    pub(crate) closed: Vec<(LaneId, Vec<Fed>)>,
    /// Prompts that were tokenised.
    pub(crate) encoded: Vec<(ModelId, PromptSource)>,
    pub(crate) forks: Vec<(LaneId, LaneId, Option<u32>)>,
    pub(crate) truncations: Vec<(LaneId, u32)>,
    /// Hidden states given, as input embeddings.
    pub(crate) hidden: Vec<(LaneId, Align, Vec<f32>)>,
    /// Positions ever fed to every lane.
    pub(crate) forwarded: BTreeMap<LaneId, u32>,
    /// Slots of every call.
    pub(crate) calls: Vec<Vec<SlotId>>,
    /// Positions fed in every call, by lane.
    pub(crate) fed: Vec<Vec<(LaneId, usize)>>,
    /// Lanes that were compressed, and what they held.
    pub(crate) compressed: Vec<(LaneId, usize)>,
    /// A slot whose lanes cannot be opened, and how many calls that open some succeed before.
    pub(crate) shut: Option<(SlotId, usize)>,
    /// A slot with which calls fail, and how many calls succeed before.
    pub(crate) bad: Option<(SlotId, usize)>,
}

impl Recorder {
    pub(crate) fn new(inner: MockBackend) -> Self {
        Self {
            inner,
            lanes: BTreeMap::new(),
            closed: Vec::new(),
            encoded: Vec::new(),
            forks: Vec::new(),
            truncations: Vec::new(),
            hidden: Vec::new(),
            forwarded: BTreeMap::new(),
            calls: Vec::new(),
            fed: Vec::new(),
            compressed: Vec::new(),
            shut: None,
            bad: None,
        }
    }

    pub(crate) fn hashed(agents: usize) -> Self {
        Self::new(MockBackend::hashed(agents, VOCAB, 1, ROOM))
    }

    /// What an agent's lane held when it was last closed or reopened.
    pub(crate) fn last(&self, agent: u32) -> &[Fed] {
        self.closed
            .iter()
            .rev()
            .find(|(lane, _)| lane.agent == AgentId(agent))
            .map_or(&[], |(_, held)| held)
    }

    /// What a lane held when it was last closed or reopened.
    pub(crate) fn of(&self, slot: u32, agent: u32) -> &[Fed] {
        self.closed
            .iter()
            .rev()
            .find(|(lane, _)| *lane == self::lane(slot, agent))
            .map_or(&[], |(_, held)| held)
    }

    /// What the lanes of an agent held, from the first to the last.
    pub(crate) fn all(&self, agent: u32) -> Vec<&[Fed]> {
        self.closed
            .iter()
            .filter(|(lane, _)| lane.agent == AgentId(agent))
            .map(|(_, held)| held.as_slice())
            .collect()
    }

    fn put_away(&mut self, lane: LaneId) {
        if let Some(held) = self.lanes.remove(&lane) {
            self.closed.push((lane, held));
        }
    }
}

fn positions(feed: &Feed<'_>) -> Vec<Fed> {
    match feed {
        Feed::Tokens(ids) => fed_tokens(ids),
        Feed::Packets(packets) => fed_packets(*packets),
        Feed::Payload(Payload::Embed { values, hidden }) => values
            .chunks_exact(*hidden as usize)
            .map(|row| Fed::Embed(row.to_vec()))
            .collect(),
        Feed::Payload(Payload::Dense { probs, vocab }) => probs
            .chunks_exact(*vocab as usize)
            .map(|row| Fed::Dense(row.to_vec()))
            .collect(),
        Feed::Hidden { .. } => panic!("the loop sends hidden states as vectors"),
    }
}

impl Backend for Recorder {
    fn info(&self) -> &EnsembleInfo {
        self.inner.info()
    }

    fn encode(&mut self, model: ModelId, source: &PromptSource) -> Result<Vec<u32>, BackendError> {
        self.encoded.push((model, source.clone()));
        self.inner.encode(model, source)
    }

    fn reserve(&mut self, slots: u32, max_len: u32) -> Result<(), BackendError> {
        self.inner.reserve(slots, max_len)
    }

    fn open(&mut self, lanes: &[LaneSpec]) -> Result<(), BackendError> {
        if let Some((slot, left)) = &mut self.shut
            && lanes.iter().any(|spec| spec.lane.slot == *slot)
        {
            *left = left
                .checked_sub(1)
                .ok_or_else(|| BackendError::Invalid("no room".into()))?;
        }
        self.inner.open(lanes)?;
        for spec in lanes {
            self.put_away(spec.lane);
            self.lanes.insert(spec.lane, Vec::new());
        }
        Ok(())
    }

    fn advance(&mut self, rows: &[Row<'_>], out: &mut Readout) -> Result<(), BackendError> {
        if let Some((slot, after)) = self.bad
            && self.calls.len() >= after
            && rows.iter().any(|row| row.slot == slot)
        {
            return Err(BackendError::Failed {
                context: "forward".into(),
                source: "device side assert".into(),
            });
        }
        self.inner.advance(rows, out)?;
        self.calls.push(rows.iter().map(|row| row.slot).collect());
        self.fed.push(Vec::new());
        for row in rows {
            for (agent, feed) in row.feeds {
                let lane = LaneId {
                    slot: row.slot,
                    agent: *agent,
                };
                *self.forwarded.entry(lane).or_default() += feed.positions() as u32;
                if let Some(call) = self.fed.last_mut() {
                    call.push((lane, feed.positions()));
                }
                self.lanes.entry(lane).or_default().extend(positions(feed));
            }
        }
        Ok(())
    }

    fn embed(
        &mut self,
        model: ModelId,
        packets: &[BeliefPacket],
    ) -> Result<Embeddings, BackendError> {
        let given = self.inner.embed(model, packets)?;
        // As wide as the model, which the mock does not look at.
        let hidden = self.info().models[model.index()].hidden;
        let rows = given.values.chunks_exact(given.hidden as usize);
        let widened = rows.flat_map(|row| {
            let filled = row.iter().copied().chain(std::iter::repeat(0.25));
            filled.take(hidden as usize).collect::<Vec<f32>>()
        });
        Ok(Embeddings {
            values: widened.collect(),
            hidden,
        })
    }

    fn hidden(&mut self, lanes: &[LaneId], align: Align) -> Result<Embeddings, BackendError> {
        let given = self.inner.hidden(lanes, align)?;
        for (&lane, row) in lanes
            .iter()
            .zip(given.values.chunks_exact(given.hidden as usize))
        {
            self.hidden.push((lane, align, row.to_vec()));
        }
        Ok(given)
    }

    fn compress(&mut self, lanes: &[LaneId]) -> Result<(), BackendError> {
        for lane in lanes {
            let held = self.lanes.get(lane).map_or(0, Vec::len);
            self.compressed.push((*lane, held));
        }
        self.inner.compress(lanes)
    }

    fn fork(&mut self, from: LaneId, to: LaneId, upto: Option<u32>) -> Result<(), BackendError> {
        self.inner.fork(from, to, upto)?;
        self.forks.push((from, to, upto));
        let mut held = self.lanes.get(&from).cloned().unwrap_or_default();
        held.truncate(upto.map_or(usize::MAX, |n| n as usize));
        self.lanes.insert(to, held);
        Ok(())
    }

    fn truncate(&mut self, lane: LaneId, len: u32) -> Result<(), BackendError> {
        self.inner.truncate(lane, len)?;
        self.truncations.push((lane, len));
        if let Some(held) = self.lanes.get_mut(&lane) {
            held.truncate(len as usize);
        }
        Ok(())
    }

    fn close(&mut self, slots: &[SlotId]) {
        self.inner.close(slots);
        let gone: Vec<LaneId> = self
            .lanes
            .keys()
            .filter(|lane| slots.contains(&lane.slot))
            .copied()
            .collect();
        for lane in gone {
            self.put_away(lane);
        }
    }

    fn memory(&self) -> MemoryStats {
        self.inner.memory()
    }
}

/// A transcript of packets as it is put on a link, at steps 0, 1 and so on.
pub(crate) fn transcript(packets: &[BeliefPacket], fingerprint: u64) -> Transcript {
    let mut made = Transcript::new(VOCAB, fingerprint).expect("a small vocabulary");
    for (step, packet) in (0..).zip(packets) {
        made.push(step, packet.clone()).expect("in order");
    }
    made
}

/// What a receiver decodes of packets, and the bytes that crossed.
pub(crate) fn through_wire(
    packets: &[BeliefPacket],
    encoding: Encoding,
) -> (Vec<BeliefPacket>, u64) {
    let sent = transcript(packets, u64::from(VOCAB));
    let bytes = sent.encode(encoding).expect("encodes");
    assert_eq!(bytes.len(), sent.encoded_len(encoding));
    let received = Transcript::decode_exact(&bytes).expect("decodes");
    (received.into_packets(), bytes.len() as u64)
}

/// Packets of a sample's latent steps.
pub(crate) fn packets_of(outcome: &Outcome) -> Vec<BeliefPacket> {
    outcome.packets.iter().map(|(_, p)| p.clone()).collect()
}
