//! Runs a preset on scripted logits and notes what its lanes were fed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use dlmom_core::{Mode, Stream, sample_key};
use dlmom_packet::BeliefPacket;
use dlmom_runs::{
    Experiment, LOCKSTEP, Overrides, PRESETS, Placement, Plan, PlannedCell, Preset, Registry,
    Seating, Setting, seating,
};
use dlmom_runtime::{
    AgentId, Align, Backend, BackendError, Embeddings, EnsembleInfo, Feed, HandoffRecord, Job,
    JobKey, LaneId, LaneSpec, LoopConfig, MemoryStats, MockBackend, ModelId, Outcome, Payload,
    PromptSource, Readout, Row, RunOptions, Sink, SlotId, StepEvent, run,
};

use crate::published::Logits;

/// Room for whatever the tests feed to a lane.
const ROOM: u32 = 1024;
const ITEM: &str = "item-0";
const SEED: u64 = 11;

/// The named draws of the only sample at a step.
pub(crate) fn stream(step: usize) -> Stream {
    Stream {
        seed: SEED,
        sample: sample_key(ITEM, 0, 0),
        step: step as u64,
    }
}

/// Cells of a preset for one model, or for `experts` of different models, in its topology.
pub(crate) fn planned(name: &str, experts: usize, overrides: &Overrides) -> (PlannedCell, Seating) {
    let preset = Preset::named(name).unwrap();
    let topology = preset.topology.as_deref().unwrap_or(LOCKSTEP);
    let (plan, seating) = planned_in(&preset, topology, experts, overrides);
    (plan.cells.into_iter().next_back().unwrap(), seating)
}

pub(crate) fn planned_in(
    preset: &Preset,
    topology: &str,
    experts: usize,
    overrides: &Overrides,
) -> (Plan, Seating) {
    let seating = seating(topology, experts).unwrap();
    let setting = Setting {
        shared_model: experts == 1,
        experts: seating.seats.len(),
        topology: seating.topology.clone(),
    };
    let mut registry = Registry::builtin().unwrap();
    registry.add(PRESETS, vec![preset.cell()]);
    let suites = [PRESETS.to_owned()];
    let plan = registry.expand(&suites, &[], &setting, overrides).unwrap();
    (plan, seating)
}

pub(crate) fn loop_of(experiment: &Experiment, seating: &Seating) -> LoopConfig {
    let placement = Placement {
        topology: seating.topology.clone(),
        pilot: None,
    };
    experiment.loop_config(&placement).unwrap()
}

/// The loop of a preset, with so many steps.
pub(crate) fn preset_loop(name: &str, experts: usize, max_steps: u32) -> LoopConfig {
    let overrides = Overrides {
        max_steps: Some(max_steps),
        ..Overrides::default()
    };
    let (cell, seating) = planned(name, experts, &overrides);
    loop_of(&cell.experiment, &seating)
}

/// Logits for an agent whose lane holds so many positions.
pub(crate) type Script = Box<dyn Fn(u32, usize) -> Logits + Send>;

/// Logits by the number of the call, whatever the lanes hold; the last row stays.
pub(crate) fn by_call(rows: Vec<Logits>) -> Script {
    let calls = AtomicUsize::new(0);
    Box::new(move |_, _| {
        let call = calls.fetch_add(1, Ordering::Relaxed);
        rows[call.min(rows.len() - 1)].clone()
    })
}

/// What one position of a lane was fed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fed {
    Token(u32),
    /// A mixture of token embeddings, whether it travelled as packet, distribution or vector.
    Mixture(Vec<(u32, f32)>),
    /// The hidden state behind an agent's last position, of so many, aligned.
    State {
        agent: u32,
        held: usize,
        align: Align,
    },
}

impl Fed {
    /// The weights of a mixture or a token over a vocabulary.
    pub(crate) fn weights(&self, vocab: usize) -> Vec<f64> {
        let mut dense = vec![0.0; vocab];
        match self {
            Self::Token(id) => dense[*id as usize] = 1.0,
            Self::Mixture(entries) => entries
                .iter()
                .for_each(|&(id, p)| dense[id as usize] = f64::from(p)),
            Self::State { .. } => panic!("{self:?} is no mixture"),
        }
        dense
    }

    /// How many tokens take part.
    pub(crate) fn entries(&self) -> usize {
        match self {
            Self::Mixture(entries) => entries.iter().filter(|(_, p)| *p > 0.0).count(),
            Self::Token(_) | Self::State { .. } => 1,
        }
    }
}

/// Fails unless a position was fed these weights.
pub(crate) fn assert_fed(fed: &Fed, expected: &[f64], tolerance: f64, what: &str) {
    let weights = fed.weights(expected.len());
    for (id, (found, expected)) in weights.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= tolerance && (*found > 0.0) == (*expected > 0.0),
            "{what}: id {id} is fed with {found}, not {expected}"
        );
    }
}

/// A step as it was decided.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) agent: u32,
    pub(crate) mode: Mode,
    /// The entropy as the controller saw it.
    pub(crate) observed: f64,
    pub(crate) token: Option<u32>,
    pub(crate) injected: Vec<u32>,
}

/// A finished run.
pub(crate) struct Seen {
    pub(crate) outcome: Outcome,
    pub(crate) events: Vec<Event>,
    pub(crate) handoffs: Vec<HandoffRecord>,
    /// What the lane of every agent was fed, from its first position on.
    pub(crate) lanes: BTreeMap<u32, Vec<Fed>>,
}

impl Seen {
    pub(crate) fn modes(&self) -> Vec<Mode> {
        self.events.iter().map(|e| e.mode).collect()
    }

    /// What the lane of a sample's only agent was fed behind its prompt.
    pub(crate) fn fed(&self) -> &[Fed] {
        &self.lanes[&0][prompt(0).len()..]
    }

    /// Tokens that were printed, by step.
    pub(crate) fn tokens(&self) -> Vec<Option<u32>> {
        self.events.iter().map(|e| e.token).collect()
    }
}

#[derive(Default)]
struct Collect {
    outcome: Option<Outcome>,
    events: Vec<Event>,
    handoffs: Vec<HandoffRecord>,
}

impl Sink for Collect {
    fn finished(
        &mut self,
        outcome: Outcome,
        _: &EnsembleInfo,
        _: MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        assert_eq!(outcome.error, None);
        assert!(
            self.outcome.replace(outcome).is_none(),
            "one sample ends once"
        );
        Ok(())
    }

    fn step(&mut self, event: &StepEvent<'_>) {
        self.events.push(Event {
            agent: event.agent,
            mode: event.decision.mode,
            observed: event.observed,
            token: event.token,
            injected: event.injected.to_vec(),
        });
    }

    fn handoff(&mut self, _: &JobKey, record: &HandoffRecord) {
        self.handoffs.push(record.clone());
    }
}

/// The prompt of an agent, of a length of its own.
pub(crate) fn prompt(agent: u32) -> Vec<u32> {
    (0..3 + agent).map(|at| 1 + (agent + at) % 5).collect()
}

/// A mock of one model or of several that says what it fed.
pub(crate) struct Recorder {
    inner: MockBackend,
    /// Texts and the tokens they are.
    words: Vec<(&'static str, Vec<u32>)>,
    lanes: BTreeMap<LaneId, Vec<Fed>>,
    kept: BTreeMap<u32, Vec<Fed>>,
    /// Vectors that were asked for, and what they are made of.
    vectors: Vec<(Vec<f32>, Fed)>,
}

impl Recorder {
    /// Agents of one model.
    pub(crate) fn shared(agents: usize, vocab: u32, eos: &[usize], script: Script) -> Self {
        let mut made = Self::of_models(agents, vocab, eos, script);
        made.inner.info_mut().agents.fill(ModelId(0));
        made
    }

    /// Agents of a model each.
    pub(crate) fn of_models(agents: usize, vocab: u32, eos: &[usize], script: Script) -> Self {
        let mut inner = MockBackend::scripted(
            agents,
            vocab,
            1,
            ROOM,
            Box::new(move |lane, positions, out| {
                out.copy_from_slice(&script(lane.agent.0, positions.len()));
            }),
        );
        for model in &mut inner.info_mut().models {
            model.eos = eos.iter().map(|&id| id as u32).collect();
        }
        Self {
            inner,
            words: Vec::new(),
            lanes: BTreeMap::new(),
            kept: BTreeMap::new(),
            vectors: Vec::new(),
        }
    }

    /// The same, for a tokenizer that knows these texts.
    pub(crate) fn knowing(mut self, words: &[(&'static str, &[usize])]) -> Self {
        self.words = words
            .iter()
            .map(|&(text, ids)| (text, ids.iter().map(|&id| id as u32).collect()))
            .collect();
        self
    }

    /// Runs one sample.
    pub(crate) fn go(mut self, config: &LoopConfig) -> Seen {
        let agents = self.inner.info().agents.len() as u32;
        let job = Job {
            key: JobKey {
                item_id: ITEM.into(),
                seed: SEED,
                sample: 0,
            },
            prompts: (0..agents)
                .map(|agent| PromptSource::Tokens { ids: prompt(agent) })
                .collect(),
            trace: true,
            config: 0,
            schedule: None,
            rival: None,
        };
        let mut sink = Collect::default();
        let options = RunOptions::default();
        run(
            &mut self,
            config,
            &options,
            &mut std::iter::once(job),
            &mut sink,
        )
        .unwrap();
        Seen {
            outcome: sink.outcome.unwrap(),
            events: sink.events,
            handoffs: sink.handoffs,
            lanes: self.kept,
        }
    }

    fn made_of(&self, vector: &[f32]) -> Fed {
        let known = self.vectors.iter().rev().find(|(v, _)| v == vector);
        known.expect("a vector the backend has given").1.clone()
    }

    fn positions(&self, feed: &Feed<'_>) -> Vec<Fed> {
        let weighted = |probs: &[f32]| {
            let all = (0_u32..).zip(probs.iter().copied());
            Fed::Mixture(all.filter(|(_, p)| *p > 0.0).collect())
        };
        match feed {
            Feed::Tokens(ids) => ids.iter().map(|&id| Fed::Token(id)).collect(),
            Feed::Packets(packets) => packets.iter().map(mixture).collect(),
            Feed::Payload(Payload::Embed { values, hidden }) => values
                .chunks_exact(*hidden as usize)
                .map(|v| self.made_of(v))
                .collect(),
            Feed::Payload(Payload::Dense { probs, vocab }) => {
                probs.chunks_exact(*vocab as usize).map(weighted).collect()
            }
            Feed::Hidden { .. } => panic!("the loop sends hidden states as vectors"),
        }
    }
}

fn mixture(packet: &BeliefPacket) -> Fed {
    Fed::Mixture(packet.iter().collect())
}

impl Backend for Recorder {
    fn info(&self) -> &EnsembleInfo {
        self.inner.info()
    }

    fn encode(&mut self, model: ModelId, source: &PromptSource) -> Result<Vec<u32>, BackendError> {
        let PromptSource::Text { text } = source else {
            return self.inner.encode(model, source);
        };
        let known = self.words.iter().find(|(word, _)| word == text);
        Ok(known.expect("a text the tokenizer knows").1.clone())
    }

    fn reserve(&mut self, slots: u32, max_len: u32) -> Result<(), BackendError> {
        self.inner.reserve(slots, max_len)
    }

    fn open(&mut self, lanes: &[LaneSpec]) -> Result<(), BackendError> {
        self.inner.open(lanes)?;
        for spec in lanes {
            self.lanes.insert(spec.lane, Vec::new());
        }
        Ok(())
    }

    fn advance(&mut self, rows: &[Row<'_>], out: &mut Readout) -> Result<(), BackendError> {
        self.inner.advance(rows, out)?;
        for row in rows {
            for (agent, feed) in row.feeds {
                let lane = LaneId {
                    slot: row.slot,
                    agent: *agent,
                };
                let fed = self.positions(feed);
                self.lanes.entry(lane).or_default().extend(fed);
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
        let rows = given.values.chunks_exact(given.hidden as usize);
        self.vectors
            .extend(rows.map(<[f32]>::to_vec).zip(packets.iter().map(mixture)));
        Ok(given)
    }

    fn hidden(&mut self, lanes: &[LaneId], align: Align) -> Result<Embeddings, BackendError> {
        let given = self.inner.hidden(lanes, align)?;
        let rows = given.values.chunks_exact(given.hidden as usize);
        for (lane, row) in lanes.iter().zip(rows) {
            let state = Fed::State {
                agent: lane.agent.0,
                held: self.lanes[lane].len(),
                align,
            };
            self.vectors.push((row.to_vec(), state));
        }
        Ok(given)
    }

    fn fork(&mut self, from: LaneId, to: LaneId, upto: Option<u32>) -> Result<(), BackendError> {
        self.inner.fork(from, to, upto)?;
        assert_eq!(upto, None, "a cache is handed over whole");
        let held = self.lanes[&from].clone();
        self.lanes.insert(to, held);
        Ok(())
    }

    fn truncate(&mut self, lane: LaneId, len: u32) -> Result<(), BackendError> {
        self.inner.truncate(lane, len)?;
        if let Some(held) = self.lanes.get_mut(&lane) {
            held.truncate(len as usize);
        }
        Ok(())
    }

    fn close(&mut self, slots: &[SlotId]) {
        self.inner.close(slots);
        for (LaneId { agent, .. }, held) in std::mem::take(&mut self.lanes) {
            let AgentId(agent) = agent;
            self.kept.insert(agent, held);
        }
    }

    fn memory(&self) -> MemoryStats {
        self.inner.memory()
    }
}
