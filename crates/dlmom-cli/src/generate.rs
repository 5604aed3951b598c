//! `generate`: one prompt, or a conversation, with the steps on show.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use dlmom_core::{AlphaUnit, Gate};
use dlmom_runs::{
    Answer, CellKind, Comm, Experiment, JsonlWriter, Overrides, PRESETS, Placement, Preset, REF,
    Registry, Seating, Setting, SoftMode, TraceLine,
};
use dlmom_runtime::{
    AgentId, Backend, BackendError, EnsembleInfo, Handoff, HandoffRecord, Job, JobKey, LoopConfig,
    MemoryStats, Message, Outcome, PromptSource, RunOptions, Sink, StepEvent, Stop, Support,
    WireEncoding, check_config, run,
};

use crate::args::{Dtype, GateWord, alpha_unit, devices, encoding, handoff, support};
use crate::host::{EngineSpec, Host, HostError};
use crate::prepare::{
    models_and_agents, positions, preset_topology, seat, setting, without_unknown,
};
use crate::status::{CliError, ExitStatus};
use crate::timeline::{Footer, Growing, Header, Plain, Step, Timeline};

/// What crosses a link in latent steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MessageKind {
    /// The mixture embedding; agents of one model only.
    Embed,
    /// A packet of k entries.
    Belief,
    /// The whole vocabulary's distribution.
    Logits,
    /// The last hidden state, for agents of one model that move one at a time.
    Hidden,
}

/// Arguments of `generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Experts of a lockstep ensemble: local paths, hub ids or zoo:NAME.
    #[arg(long, num_args = 1.., value_name = "MODEL", required_unless_present = "model", conflicts_with = "model")]
    pub experts: Vec<String>,
    /// A single model: local path, hub id or zoo:NAME.
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Who the agents are and how they meet: a name (`list topologies`) or a file [default: sequential with --model, lockstep with --experts].
    #[arg(long, value_name = "NAME|FILE")]
    pub topology: Option<String>,
    /// A published method's knobs (`list presets`); what the command line says wins over them.
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// The prompt; - reads it from standard input.
    #[arg(long, value_name = "TEXT", required_unless_present = "chat")]
    pub prompt: Option<String>,
    /// A system message before the prompt.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Keep a conversation: one message a line from standard input.
    #[arg(long)]
    pub chat: bool,
    /// Show every step: mode, entropy, mass and the packet's first tokens.
    #[arg(long)]
    pub trace: bool,
    /// Print one JSON object instead of text.
    #[arg(long, conflicts_with = "chat")]
    pub json: bool,
    /// Append the steps to FILE, one JSON line per answer, as in a run's traces/.
    #[arg(long, value_name = "FILE")]
    pub save_trace: Option<PathBuf>,
    /// Where the forwards run: auto (the first of cuda or hip, mps, cpu that is there), cpu, cuda, hip (an AMD GPU) or mps;
    /// cuda:1 for one of several; cuda:0,cuda:1 for one for each expert.
    #[arg(long, value_parser = devices, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
    /// Storage type of weights and KV caches.
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    pub dtype: Dtype,
    /// Threads of one forward [default: physical cores].
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// Attention implementation [default: blocks where rows share a batch on a CPU, else sdpa, else eager].
    #[arg(long, value_parser = ["blocks", "sdpa", "eager"], value_name = "blocks|sdpa|eager")]
    pub attention: Option<String>,
    /// What reads logits: rust on the host, torch or triton where they are [default: triton on a GPU that can, else torch
    /// there, else rust].
    #[arg(long, value_parser = ["rust", "torch", "triton"], value_name = "rust|torch|triton")]
    pub kernel: Option<String>,
    /// Allow a model folder to run its own Python code.
    #[arg(long)]
    pub trust_remote_code: bool,
    /// Seed of every draw.
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub seed: u64,
    /// Most latent and explicit steps together.
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_steps: u32,
    /// Most latent steps.
    #[arg(long, value_name = "N")]
    pub max_latent_steps: Option<u32>,
    /// Most handoffs, in a sequential topology [default: the length of the chain less one].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub max_handoffs: Option<u32>,
    /// What an agent hands to the next, in a sequential topology.
    #[arg(long, value_parser = handoff, value_name = "transcript|text|kv")]
    pub handoff: Option<Handoff>,
    /// Cap on mode switches; -1 is unlimited.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub max_switches: Option<i64>,
    /// Rule of the controller [default: threshold].
    #[arg(long, value_enum)]
    pub gate: Option<GateWord>,
    /// Window of the trend gate in steps [default: 5].
    #[arg(long, value_name = "N")]
    pub w: Option<u32>,
    /// Entropy threshold.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub alpha: Option<f64>,
    /// Unit of alpha.
    #[arg(long, value_parser = alpha_unit, value_name = "normalized|nats")]
    pub alpha_unit: Option<AlphaUnit>,
    /// Entries of a packet; -1 is the whole vocabulary [default: 50].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub k: Option<i64>,
    /// What crosses a link in latent steps [default: embed for one model, else belief].
    #[arg(long, value_enum)]
    pub message: Option<MessageKind>,
    /// How packets and whole-vocabulary messages are written.
    #[arg(long, value_parser = encoding, value_name = "f32|f16|bf16|compact")]
    pub encoding: Option<WireEncoding>,
    /// What consensus sees of an agent: every logit, or only its message.
    #[arg(long, value_parser = support, value_name = "full|packet")]
    pub support: Option<Support>,
    /// Gumbel-Softmax noise on packets, at this temperature.
    #[arg(
        long,
        value_name = "TAU",
        conflicts_with = "dirichlet",
        allow_negative_numbers = true
    )]
    pub gumbel: Option<f64>,
    /// Dirichlet noise on packets, with this concentration.
    #[arg(long, value_name = "LAMBDA", allow_negative_numbers = true)]
    pub dirichlet: Option<f64>,
    /// Temperature of printed tokens; 0 is greedy [default: 0].
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// Keep the N most probable tokens; 0 keeps all [default: 0].
    #[arg(long, value_name = "N")]
    pub top_k: Option<u32>,
    /// Keep the most probable tokens up to this mass [default: 1].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Keep tokens with at least this share of the largest probability [default: 0].
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f64>,
    /// Log-probabilities of tokens printed before are multiplied by this, at least 1 [default: 1].
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f64>,
}

/// The reference pipeline, or a preset, with the knobs of the command line.
fn experiment(
    args: &GenerateArgs,
    preset: Option<&Preset>,
    setting: &Setting,
) -> Result<Experiment, CliError> {
    let overrides = Overrides {
        alpha: args.alpha,
        alpha_unit: args.alpha_unit,
        max_switches: args.max_switches,
        max_steps: Some(args.max_steps),
        max_latent_steps: args.max_latent_steps,
        k: args.k,
        encoding: args.encoding,
        support: args.support,
        handoff: args.handoff,
        max_handoffs: args.max_handoffs,
        gate: args.gate.map(Gate::from),
        w: args.w.or((args.gate == Some(GateWord::Trend)).then_some(5)),
        ..Overrides::default()
    };
    let mut registry = Registry::builtin()?;
    let (suite, id) = match preset {
        None => ("A1", REF),
        Some(preset) => {
            registry.add(PRESETS, vec![preset.cell()]);
            (PRESETS, preset.name.as_str())
        }
    };
    let plan = registry.expand(&[suite.to_owned()], &[id.to_owned()], setting, &overrides)?;
    let cell = plan
        .cells
        .into_iter()
        .find(|cell| cell.experiment.id == id)
        .ok_or_else(|| CliError::Failed(format!("{id} is missing")))?;
    if let CellKind::Skip { reason } = cell.kind {
        return Err(CliError::Usage(format!("{id}: {reason}")));
    }
    let mut experiment = cell.experiment;
    // A preset is a cell, whose own knobs win over the command line of a run. Here the command line is the last word.
    experiment.gate = args.gate.map_or(experiment.gate, Gate::from);
    experiment.alpha = args.alpha.unwrap_or(experiment.alpha);
    experiment.alpha_unit = args.alpha_unit.unwrap_or(experiment.alpha_unit);
    experiment.cap = args.max_switches.unwrap_or(experiment.cap);
    experiment.max_latent_steps = args.max_latent_steps.unwrap_or(experiment.max_latent_steps);
    experiment.k = args.k.unwrap_or(experiment.k);
    experiment.encoding = args.encoding.unwrap_or(experiment.encoding);
    experiment.support = args.support.unwrap_or(experiment.support);
    experiment.handoff = args.handoff.or(experiment.handoff);
    experiment.max_handoffs = args.max_handoffs.or(experiment.max_handoffs);
    experiment.w = args
        .w
        .or(experiment.w)
        .or((experiment.gate == Gate::Trend).then_some(5));
    if let Some(message) = args.message {
        experiment.comm = match message {
            MessageKind::Embed => Comm::Embed,
            MessageKind::Belief => Comm::Belief,
            MessageKind::Logits => Comm::Logits,
            MessageKind::Hidden => Comm::Hidden,
        };
        if message == MessageKind::Logits && args.k.is_none() {
            experiment.k = -1;
        }
    }
    if let Some(tau) = args.gumbel {
        experiment.soft_mode = SoftMode::Gumbel;
        experiment.tau = Some(tau);
    } else if let Some(lambda) = args.dirichlet {
        experiment.soft_mode = SoftMode::Dirichlet;
        experiment.lambda = Some(lambda);
    }
    let sampling = &mut experiment.sampling;
    sampling.temperature = args.temperature.unwrap_or(sampling.temperature);
    sampling.top_k = args.top_k.unwrap_or(sampling.top_k);
    sampling.top_p = args.top_p.unwrap_or(sampling.top_p);
    sampling.min_p = args.min_p.unwrap_or(sampling.min_p);
    sampling.repetition_penalty = args
        .repetition_penalty
        .unwrap_or(sampling.repetition_penalty);
    Ok(experiment)
}

fn config(experiment: &Experiment, seating: &Seating) -> Result<LoopConfig, CliError> {
    if experiment.alpha_unit == AlphaUnit::Quantile {
        return Err(CliError::Usage(
            "--alpha-unit quantile: ranks entropies among those of a run's pilot, and one prompt has none; give alpha in nats or normalized".into(),
        ));
    }
    let config = experiment.loop_config(&Placement {
        topology: seating.topology.clone(),
        pilot: None,
    })?;
    config.validate(None)?;
    config.validate_agents(seating.seats.len())?;
    Ok(config)
}

/// Text of standard input, or the flag's.
fn prompt(args: &GenerateArgs) -> Result<Option<String>, CliError> {
    let text = match args.prompt.as_deref() {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .map_err(|e| CliError::Usage(format!("--prompt -: standard input: {e}")))?;
            text.trim_end_matches(['\n', '\r']).to_owned()
        }
        Some(text) => text.to_owned(),
        None => return Ok(None),
    };
    if text.trim().is_empty() {
        return Err(CliError::Usage("--prompt: the prompt is empty".into()));
    }
    Ok(Some(text))
}

pub(crate) fn command(
    args: &GenerateArgs,
    host: &mut dyn Host,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    if args.threads == Some(0) {
        return Err(CliError::Usage("--threads: give at least 1".into()));
    }
    let first = prompt(args)?;
    let preset = args.preset.as_deref().map(Preset::named).transpose()?;
    let topology = preset_topology(preset.as_slice(), args.topology.as_deref())?;
    let (experts, seating) = seat(&args.experts, args.model.as_ref(), topology)?;
    let setting = setting(&experts, &seating);
    let mut experiment = experiment(args, preset.as_ref(), &setting)?;
    config(&experiment, &seating)?;
    let mut traces = match &args.save_trace {
        None => None,
        Some(path) => Some(
            JsonlWriter::open(path, |_, _| Ok(()))
                .map_err(|e| CliError::Usage(format!("--save-trace: {e}")))?
                .0,
        ),
    };
    let (models, agents) = models_and_agents(&experts, &seating);
    let spec = EngineSpec {
        experts: models,
        agents,
        device: args.device.clone(),
        dtype: args.dtype.name().into(),
        slots: 1,
        threads: args.threads,
        trust_remote_code: args.trust_remote_code,
        deterministic: false,
        fast: false,
        attention: args.attention.clone(),
        kernel: args.kernel.clone(),
        graphs: false,
    };
    let mut backend = host.load(&spec).map_err(|error| match error {
        HostError::NeedsPython(_) => HostError::NeedsPython("generate"),
        other => other,
    })?;
    if let Some(preset) = &preset {
        for line in without_unknown(preset, &mut experiment, &mut *backend)? {
            writeln!(err, "note: {line}")?;
        }
    }
    let vocab = backend.info().models.iter().map(|m| m.vocab).min();
    // A packet of a small vocabulary is all of it; only what was asked for is an error.
    if let Some(vocab) = vocab.map(i64::from)
        && args.k.is_none()
        && experiment.k > vocab
    {
        experiment.k = vocab;
    }
    let config = config(&experiment, &seating)?;
    check_config(&config, backend.info())?;

    let mut messages: Vec<Message> = Vec::new();
    if let Some(system) = &args.system {
        messages.push(message("system", system));
    }
    let mut next = first;
    loop {
        let Some(text) = next
            .take()
            .map_or_else(|| read_line(args, err), |t| Ok(Some(t)))?
        else {
            return Ok(ExitStatus::Success);
        };
        messages.push(message("user", &text));
        let outcome = ask(
            args,
            &config,
            &seating,
            &messages,
            &mut *backend,
            host,
            out,
            err,
        )?;
        if let Some(writer) = &mut traces
            && let Some(trace) = &outcome.trace
        {
            writer.append(&TraceLine {
                experiment: "generate".into(),
                key: outcome.key.clone(),
                trace: trace.clone(),
            })?;
        }
        let failed = failure(&outcome);
        messages.push(message("assistant", &outcome.text));
        if args.json {
            let answer = Answer::new(&experts, &text, &config, outcome, args.trace);
            let line = serde_json::to_string(&answer)
                .map_err(|e| CliError::Failed(format!("the answer has no JSON: {e}")))?;
            writeln!(out, "{line}")?;
        }
        if let Some(failed) = failed {
            return Err(CliError::Failed(failed));
        }
        if !args.chat {
            return Ok(ExitStatus::Success);
        }
    }
}

fn message(role: &str, content: &str) -> Message {
    Message {
        role: role.into(),
        content: content.into(),
    }
}

/// The next message of a conversation; none at the end of the input.
fn read_line(args: &GenerateArgs, err: &mut dyn Write) -> Result<Option<String>, CliError> {
    if !args.chat {
        return Ok(None);
    }
    let stdin = std::io::stdin();
    loop {
        if stdin.is_terminal() {
            write!(err, "> ")?;
            err.flush()?;
        }
        let mut line = String::new();
        if stdin.lock().read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let line = line.trim();
        if !line.is_empty() {
            return Ok(Some(line.to_owned()));
        }
    }
}

/// What went wrong with a sample, where something did.
fn failure(outcome: &Outcome) -> Option<String> {
    match outcome.stop {
        Stop::NanInf | Stop::Prompt | Stop::Backend => Some(
            outcome
                .error
                .clone()
                .unwrap_or_else(|| "the sample failed".into()),
        ),
        Stop::Eos | Stop::Budget | Stop::Context | Stop::Handoffs => None,
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "the parts of one command, each used once"
)]
fn ask(
    args: &GenerateArgs,
    config: &LoopConfig,
    seating: &Seating,
    messages: &[Message],
    backend: &mut dyn Backend,
    host: &mut dyn Host,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<Outcome, CliError> {
    let info = backend.info().clone();
    let source = PromptSource::Chat {
        messages: messages.to_vec(),
    };
    let prompts = seating.prompts(&source);
    let mut longest = 0;
    for (&model, source) in info.agents.iter().zip(&prompts) {
        let model_info = &info.models[model.index()];
        let length = backend
            .encode(model, source)
            .map_err(|e| match e {
                BackendError::Invalid(what) => CliError::Usage(format!("--prompt: {what}")),
                other => other.into(),
            })?
            .len() as u32;
        if model_info.context.is_some_and(|context| length >= context) {
            return Err(CliError::Usage(format!(
                "--prompt: the prompt has {length} tokens, {} has a context of {}",
                model_info.name,
                model_info.context.unwrap_or_default()
            )));
        }
        longest = longest.max(length);
    }
    let context = info.models.iter().filter_map(|m| m.context).min();
    let wanted = positions(backend, config, longest)?;
    backend.reserve(1, wanted.min(context.unwrap_or(u32::MAX)))?;
    let first = info.model_of(AgentId(0)).cloned().unwrap_or_default();
    let names = info
        .agents
        .iter()
        .zip(&seating.seats)
        .map(|(m, seat)| named(&info.models[m.index()].name, seat.role.as_deref()))
        .collect();
    let title = messages.last().map_or("", |m| m.content.as_str());
    let title: String = title.split_whitespace().collect::<Vec<_>>().join(" ");
    let header = Header::new(
        format!("prompt: {title}"),
        names,
        config,
        Some(f64::from(first.vocab).ln()),
    );
    let rich = (args.trace && !args.json && host.output_terminal())
        .then(|| host.timeline())
        .flatten();
    let mut view = View {
        shape: match rich {
            _ if args.json => Shape::Silent,
            Some(view) => Shape::Timeline(view),
            None if args.trace => Shape::Plain(Plain::new(&mut *out)),
            None => Shape::Text(&mut *out),
        },
        host,
        speaker: config
            .topology
            .chain()
            .map(|chain| chain.limit().min(chain.roles.len() as u32 - 1)),
        growing: Growing::default(),
        outcome: None,
        printed: false,
        broken: None,
    };
    view.start(&header);
    let job = Job {
        key: JobKey {
            item_id: "prompt".into(),
            seed: args.seed,
            sample: 0,
        },
        prompts,
        trace: true,
        config: 0,
        schedule: None,
        rival: None,
    };
    let options = RunOptions {
        max_failures: 1,
        rows: Some(1),
        ..RunOptions::default()
    };
    let ended = run(
        backend,
        config,
        &options,
        &mut std::iter::once(job),
        &mut view,
    );
    let View {
        outcome,
        broken,
        printed,
        ..
    } = view;
    if let Some(error) = broken {
        return Err(error.into());
    }
    if let Err(error) = ended {
        if printed {
            // What was printed has no line end yet.
            let _ = writeln!(out);
        }
        return Err(error.into());
    }
    let outcome = outcome.ok_or_else(|| CliError::Failed("the loop brought no answer".into()))?;
    if !args.json && !args.trace {
        writeln!(out)?;
        if std::io::stderr().is_terminal() {
            writeln!(err, "{}", facts(&outcome, info.agents.len()).join("\n"))?;
        }
    }
    Ok(outcome)
}

/// An agent's model, with its role where it has one.
pub(crate) fn named(model: &str, role: Option<&str>) -> String {
    role.map_or_else(|| model.to_owned(), |role| format!("{model} ({role})"))
}

/// One handoff in words.
pub(crate) fn handoff_words(record: &HandoffRecord) -> String {
    format!(
        "agent {} to {} ({}): {} of {} positions, {} bytes",
        record.from,
        record.to,
        record.trigger.as_str().replace('_', " "),
        record.payload.as_str(),
        record.positions,
        record.bytes
    )
}

fn facts(outcome: &Outcome, agents: usize) -> Vec<String> {
    let end = match outcome.stop {
        Stop::Eos => "ended by itself",
        Stop::Budget => "out of steps",
        Stop::Context => "out of context",
        Stop::Handoffs => "out of handoffs",
        Stop::NanInf | Stop::Prompt | Stop::Backend => "failed",
    };
    let link = if agents == 1 { " (loopback)" } else { "" };
    let mut facts = vec![format!(
        "{} steps: {} latent, {} printed; {} switches; {end}",
        outcome.total_steps(),
        outcome.latent_steps,
        outcome.explicit_tokens,
        outcome.switches,
    )];
    facts.push(format!(
        "link{link}: {} bytes up, {} bytes down; {:.2} s",
        outcome.uplink_bytes, outcome.downlink_bytes, outcome.latency_s
    ));
    facts.extend(
        outcome
            .handoff_log
            .iter()
            .map(|record| format!("handoff: {}", handoff_words(record))),
    );
    facts.extend(outcome.error.clone());
    facts
}

enum Shape<'a> {
    Silent,
    Text(&'a mut dyn Write),
    Plain(Plain<&'a mut dyn Write>),
    Timeline(Box<dyn Timeline>),
}

/// Shows a sample as it runs.
struct View<'a> {
    shape: Shape<'a>,
    host: &'a mut dyn Host,
    /// Place of the agent that answers, in a chain; what others print is notes.
    speaker: Option<u32>,
    growing: Growing,
    outcome: Option<Outcome>,
    printed: bool,
    broken: Option<std::io::Error>,
}

impl View<'_> {
    fn timeline(&mut self) -> Option<&mut dyn Timeline> {
        match &mut self.shape {
            Shape::Plain(plain) => Some(plain),
            Shape::Timeline(view) => Some(&mut **view),
            Shape::Silent | Shape::Text(_) => None,
        }
    }

    fn start(&mut self, header: &Header) {
        if let Some(view) = self.timeline() {
            view.start(header);
        }
    }

    fn print(&mut self, text: &str) {
        if let Shape::Text(out) = &mut self.shape
            && self.broken.is_none()
        {
            self.printed |= !text.is_empty();
            let written = write!(out, "{text}").and_then(|()| out.flush());
            self.broken = written.err();
        }
    }
}

impl Sink for View<'_> {
    fn finished(
        &mut self,
        outcome: Outcome,
        info: &EnsembleInfo,
        _: MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let rest = self.growing.finish();
        self.print(&rest);
        let footer = Footer {
            text: outcome.text.clone(),
            facts: facts(&outcome, info.agents.len()),
        };
        if let Some(view) = self.timeline() {
            view.finish(&footer);
        }
        self.outcome = Some(outcome);
        Ok(())
    }

    fn step(&mut self, event: &StepEvent<'_>) {
        if self.speaker.is_none_or(|speaker| speaker == event.agent) {
            for &token in event.token.iter().chain(event.injected) {
                let text = self.growing.push(event.model, token);
                self.print(&text);
            }
        }
        let step = Step::of_event(event);
        if let Some(view) = self.timeline() {
            view.step(&step);
        }
    }

    fn poll(&mut self) -> ControlFlow<()> {
        if let Shape::Plain(plain) = &mut self.shape
            && let Some(error) = plain.error.take()
        {
            self.broken = Some(error);
        }
        if self.broken.is_some() {
            // Nobody reads any more, as behind `head`.
            return ControlFlow::Break(());
        }
        self.host.poll()
    }
}
