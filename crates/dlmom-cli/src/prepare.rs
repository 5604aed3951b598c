//! From arguments to a loaded, checked and reserved run: everything that can be wrong is found before a sample runs.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use dlmom_core::ConsensusSpec;
use dlmom_eval::{
    Bench, BenchSpec, CodeJudge, CodeRunner, EXTRACTOR_VERSION, Item, ItemSet, Limits, NoJudge,
    load,
};
use dlmom_runs::rundir::MANIFEST_FORMAT;
use dlmom_runs::{
    Experiment, Invocation, LOCKSTEP, Manifest, ManifestCell, Overrides, PRESETS, Pilot, Placement,
    Plan, Preset, Registry, RunDir, RunDirError, Seating, Setting, TokenKnob, read_manifest,
    seating,
};
use dlmom_runtime::{
    Backend, Donors, EnsembleInfo, Handoff, LoopConfig, ModelId, PromptSource, RunError,
    check_config, check_vocabularies,
};
use serde_json::{Value, json};

use crate::args::{BatchSize, Dtype, RunArgs};
use crate::host::{EngineSpec, Host};
use crate::mock;
use crate::pilot;
use crate::probe::{Probe, probe};
use crate::status::CliError;

/// Rows that the engine makes ready before the prompts are known.
const FIRST_SLOTS: u32 = 8;

/// A run that can start.
pub(crate) struct Prepared {
    pub(crate) plan: Plan,
    pub(crate) seating: Seating,
    pub(crate) placement: Placement,
    pub(crate) donors: Donors,
    pub(crate) bench: Bench,
    pub(crate) items: Vec<Item>,
    /// Tokens of every item's longest prompt, in the order of `items`.
    pub(crate) prompt_lengths: Vec<u32>,
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) judge: Box<dyn CodeJudge>,
    pub(crate) dir: RunDir,
    pub(crate) rows: u32,
}

pub(crate) fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |d| d.as_secs_f64())
}

impl Dtype {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp16 => "fp16",
            Self::Fp32 => "fp32",
        }
    }
}

/// The expanded cells and the items of a run, checked without any model.
pub(crate) struct Selection {
    pub(crate) plan: Plan,
    pub(crate) presets: Vec<Preset>,
    pub(crate) seating: Seating,
    pub(crate) bench: Bench,
    /// Whether answers are programs that have to be run.
    pub(crate) runs_code: bool,
    pub(crate) items: Vec<Item>,
    /// Items of the benchmark that are not run.
    pub(crate) spare: Vec<Item>,
    pub(crate) data_sha256: String,
    pub(crate) experts: Vec<String>,
}

/// The words of the experts, and who the agents are.
pub(crate) fn seat(
    experts: &[String],
    model: Option<&String>,
    topology: Option<&str>,
) -> Result<(Vec<String>, Seating), CliError> {
    let words = match model {
        Some(model) => vec![model.clone()],
        None => experts.to_vec(),
    };
    let default = if model.is_some() {
        "sequential"
    } else {
        LOCKSTEP
    };
    let seating = seating(topology.unwrap_or(default), words.len())?;
    if let Some(unused) =
        (0..words.len()).find(|e| !seating.seats.iter().any(|seat| seat.expert == *e))
    {
        return Err(CliError::Usage(format!(
            "--topology {}: {} is nobody's model; its {} agents are {}",
            seating.name,
            words[unused],
            seating.seats.len(),
            seating
                .seats
                .iter()
                .map(|s| s.role.as_deref().unwrap_or("unnamed"))
                .collect::<Vec<_>>()
                .join(", "),
        )));
    }
    Ok((words, seating))
}

/// The topology that presets need, where they need one.
pub(crate) fn preset_topology<'a>(
    presets: &'a [Preset],
    asked: Option<&'a str>,
) -> Result<Option<&'a str>, CliError> {
    let mut found = asked.map(|asked| (asked, "--topology"));
    for preset in presets {
        let Some(needed) = preset.topology.as_deref() else {
            continue;
        };
        match found {
            Some((other, by)) if other != needed => {
                return Err(CliError::Usage(format!(
                    "--preset {}: needs topology {needed}, {by} says {other}; run them apart",
                    preset.name
                )));
            }
            _ => found = Some((needed, &preset.name)),
        }
    }
    Ok(found.map(|(topology, _)| topology))
}

/// Which model every agent is, and the models in the order they are loaded.
pub(crate) fn models_and_agents(experts: &[String], seating: &Seating) -> (Vec<String>, Vec<u32>) {
    let mut models: Vec<String> = Vec::new();
    let mut seen: HashMap<&str, u32> = HashMap::new();
    let agents = seating
        .experts()
        .into_iter()
        .map(|expert| {
            *seen.entry(&experts[expert]).or_insert_with(|| {
                models.push(experts[expert].clone());
                models.len() as u32 - 1
            })
        })
        .collect();
    (models, agents)
}

/// What a cell means among these agents.
pub(crate) fn setting(experts: &[String], seating: &Seating) -> Setting {
    let mut words = seating.experts().into_iter().map(|e| &experts[e]);
    let first = words.next();
    Setting {
        // Agents that name one and the same model share its weights.
        shared_model: words.all(|word| Some(word) == first),
        experts: seating.seats.len(),
        topology: seating.topology.clone(),
    }
}

pub(crate) fn select(args: &RunArgs, host: &dyn Host) -> Result<Selection, CliError> {
    if args
        .seeds
        .iter()
        .enumerate()
        .any(|(i, s)| args.seeds[..i].contains(s))
    {
        return Err(CliError::Usage("--seeds: a seed is named twice".into()));
    }
    for (flag, value) in [
        ("--limit", args.limit),
        ("--pilot", args.pilot),
        ("--pilot-items", Some(args.pilot_items)),
    ] {
        if value == Some(0) {
            return Err(CliError::Usage(format!("{flag}: 0 leaves no item")));
        }
    }
    if args.out.exists() && !args.out.is_dir() {
        return Err(CliError::Usage(format!(
            "--out: {} is not a folder",
            args.out.display()
        )));
    }
    if args.threads == Some(0) {
        return Err(CliError::Usage("--threads: give at least 1".into()));
    }
    if args.drift > 0 && args.batch_size == BatchSize::Rows(1) {
        return Err(CliError::Usage(
            "--drift: a comparison needs 2 rows of the batch; give --batch-size 2 or more".into(),
        ));
    }
    let presets = args
        .preset
        .iter()
        .map(|name| Preset::named(name))
        .collect::<Result<Vec<_>, _>>()?;
    let topology = preset_topology(&presets, args.topology.as_deref())?;
    let (experts, seating) = seat(&args.experts, args.model.as_ref(), topology)?;
    let mut registry = match &args.config {
        Some(path) => Registry::load(path)?,
        None => Registry::builtin()?,
    };
    let mut suites = args.suite.clone();
    let mut only = args.only.clone();
    if !presets.is_empty() {
        registry.add(PRESETS, presets.iter().map(Preset::cell).collect());
        if !suites.is_empty() || only.is_empty() {
            suites.push(PRESETS.to_owned());
        }
        if !only.is_empty() {
            only.extend(presets.iter().map(|p| p.name.clone()));
        }
    }
    let overrides = Overrides {
        alpha: args.alpha,
        alpha_unit: args.alpha_unit,
        max_switches: args.max_switches,
        max_steps: Some(args.max_steps),
        max_latent_steps: args.max_latent_steps,
        encoding: args.encoding,
        support: args.support,
        handoff: args.handoff,
        max_handoffs: args.max_handoffs,
        ..Overrides::default()
    };
    let setting = setting(&experts, &seating);
    let plan = registry.expand(&suites, &only, &setting, &overrides)?;
    plan.check_supported()?;
    // What a pilot will find is not known yet; whatever it is, the rest has to be right.
    let assumed = Placement {
        topology: seating.topology.clone(),
        pilot: Some(Pilot::assumed(seating.seats.len())),
    };
    for experiment in plan.runs() {
        let wrong =
            |e: dlmom_runtime::ConfigError| CliError::Usage(format!("{}: {e}", experiment.id));
        let config = experiment.loop_config(&assumed)?;
        config.validate(None).map_err(wrong)?;
        config.validate_agents(seating.seats.len()).map_err(wrong)?;
    }
    let spec = BenchSpec::parse(&args.bench)?;
    let path = data_path(&spec, &args.bench, host)?;
    let ItemSet { items, data_sha256 } = load(spec.schema(), &path)?;
    let (items, spare) = choose(items, args);
    Ok(Selection {
        plan,
        presets,
        seating,
        bench: spec.bench(),
        runs_code: spec.info().runs_code(),
        items,
        spare,
        data_sha256,
        experts,
    })
}

/// Where a benchmark's items are.
pub(crate) fn data_path(
    spec: &BenchSpec,
    word: &str,
    host: &dyn Host,
) -> Result<PathBuf, CliError> {
    match spec.path() {
        Some(path) => Ok(path.to_owned()),
        None => Ok(host
            .data_dir()
            .ok_or_else(|| {
                CliError::Usage(format!("{word}: shipped with the Python package only"))
            })?
            .join(format!("{}.jsonl", spec.info().name()))),
    }
}

/// The items to run, and the others, both in the order of the file.
fn choose(items: Vec<Item>, args: &RunArgs) -> (Vec<Item>, Vec<Item>) {
    let total = items.len();
    let wanted: HashSet<usize> = match (args.limit, args.pilot) {
        (Some(limit), _) => (0..limit.min(total)).collect(),
        (None, Some(pilot)) if pilot < total => (0..pilot).map(|i| i * total / pilot).collect(),
        _ => (0..total).collect(),
    };
    let (mut chosen, mut spare) = (Vec::new(), Vec::new());
    for (place, item) in items.into_iter().enumerate() {
        if wanted.contains(&place) {
            chosen.push(item);
        } else {
            spare.push(item);
        }
    }
    (chosen, spare)
}

pub(crate) fn prepare(
    args: &RunArgs,
    argv: &[String],
    selection: Selection,
    host: &mut dyn Host,
    err: &mut dyn Write,
) -> Result<Prepared, CliError> {
    let Selection {
        mut plan,
        presets,
        seating,
        bench,
        runs_code,
        items,
        spare,
        data_sha256,
        experts,
    } = selection;
    let recorded = read_manifest(&args.out)?;
    if recorded.is_some() && !args.resume {
        return Err(RunDirError::Exists {
            path: args.out.clone(),
        }
        .into());
    }
    let runner = if runs_code {
        Some(code_runner(host, err)?)
    } else {
        None
    };
    let (models, agents) = models_and_agents(&experts, &seating);
    let spec = EngineSpec {
        experts: models,
        agents,
        device: args.device.clone(),
        dtype: args.dtype.name().into(),
        slots: match args.batch_size {
            BatchSize::Rows(rows) => rows,
            BatchSize::Auto => FIRST_SLOTS,
        },
        threads: args.threads,
        trust_remote_code: args.trust_remote_code,
        deterministic: args.deterministic,
        fast: args.fast,
        attention: args.attention.clone(),
        kernel: args.kernel.clone(),
        graphs: args.graphs,
    };
    let mut backend = mock::load(args.backend, &spec, host, err)?;
    leave_out_unknown(&mut plan, &presets, &mut *backend, err)?;
    let vocab = smallest_vocabulary(backend.info());
    let assumed = Placement {
        topology: seating.topology.clone(),
        pilot: Some(Pilot::assumed(seating.seats.len())),
    };
    for experiment in plan.runs() {
        let config = experiment.loop_config(&assumed)?;
        check_config(&config, backend.info()).map_err(|error| match error {
            RunError::Config(inner) => CliError::Usage(format!("{}: {inner}", experiment.id)),
            other => other.into(),
        })?;
    }
    let asked: Vec<&Item> = items.iter().chain(&spare).collect();
    let Lengths {
        max_len,
        prompts,
        by_item: mut prompt_lengths,
    } = longest(&mut *backend, &bench, &seating, &asked, &plan, &assumed)?;
    prompt_lengths.truncate(items.len());
    let (rows, probed) = match (args.batch_size, &recorded) {
        (BatchSize::Rows(rows), _) => (rows, None),
        (BatchSize::Auto, Some(recorded)) => (recorded.batch_size, None),
        (BatchSize::Auto, None) => {
            let k = plan.runs().map(|e| e.k).max().unwrap_or(1).unsigned_abs() as u32;
            let found = probe(&mut *backend, &prompts, max_len, k, &ConsensusSpec::paper())?;
            (found.rows, Some(found))
        }
    };
    if args.drift > 0 && rows < 2 {
        return Err(CliError::Usage(
            "--drift: a comparison needs 2 rows of the batch, and auto chose 1; give --batch-size 2 or more".into(),
        ));
    }
    backend.reserve(rows, max_len)?;
    let info = backend.info().clone();
    let wanted = pilot::Wanted::of(&plan, args.pilot_items);
    let piloted = pilot::find(
        &wanted,
        recorded.as_ref(),
        &args.out,
        &pilot::Surroundings {
            seating: &seating,
            bench: &bench,
            items: &items,
            spare: &spare,
            rows,
            // A resumed run keeps its first seed.
            seed: recorded
                .as_ref()
                .and_then(|m| m.seeds.first().copied())
                .unwrap_or(args.seeds[0]),
        },
        &plan,
        &mut *backend,
        host,
        err,
    )?;
    if !info.bit_invariant {
        writeln!(
            err,
            "note: rows are not bit-invariant: {}",
            info.bit_invariance_reason
        )?;
    }
    for model in &info.models {
        if let Some(reason) = &model.path_reason {
            writeln!(
                err,
                "note: {} is served one row at a time: {reason}",
                model.name
            )?;
        }
    }
    let environment = mock::environment(args, host);
    let mut context = json!({
        "models": info.models.iter().map(|m| json!({
            "name": m.name,
            "revision": m.revision,
            "weights_sha256": m.weights_sha256,
            "vocabulary": format!("{:016x}", m.fingerprint),
            "dtype": m.dtype,
            "cache": m.path,
            "attention": m.attention,
        })).collect::<Vec<_>>(),
        "agents": info.agents,
        "topology": topology_facts(&seating)?,
        "bench": bench.name(),
        "data_sha256": data_sha256,
        "device": info.device,
        "threads": info.threads,
        "extractor_version": EXTRACTOR_VERSION,
        "torch": environment.get("torch").cloned().unwrap_or(Value::Null),
        "transformers": environment.get("transformers").cloned().unwrap_or(Value::Null),
        "bit_invariant": info.bit_invariant,
    });
    if let Some(runner) = &runner {
        context["python"] = json!(runner.version());
    }
    if info.consensus_kernel != "rust" {
        context["consensus_kernel"] = json!(info.consensus_kernel);
    }
    if info.graphs {
        context["graphs"] = json!(true);
    }
    if !info.bit_invariant {
        context["rows"] = json!(rows);
    }
    if !info.bit_invariant || info.fixed_length {
        context["max_len"] = json!(info.max_len);
    }
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        version: env!("CARGO_PKG_VERSION").into(),
        bench: bench.name().into(),
        data_sha256,
        items: items.len() as u64,
        seeds: args.seeds.clone(),
        samples: 1,
        batch_size: rows,
        models: serde_json::to_value(&info.models).map_err(|e| CliError::Failed(e.to_string()))?,
        shared_model: spec.experts.len() == 1,
        experts: info.agents.len() as u64,
        ln_vocab: one_vocabulary(&info).then(|| f64::from(vocab).ln()),
        cells: ManifestCell::of_plan(&plan, &context, piloted.pilot.as_ref())?,
        context,
        pilot: piloted.pilot.clone(),
        environment,
        invocations: vec![Invocation {
            argv: argv.to_vec(),
            started_at: now(),
            finished_at: None,
        }],
        notes: notes(&info, probed.as_ref(), max_len),
    };
    let dir = RunDir::open(&args.out, &plan, manifest, args.resume)?;
    if let Some(bytes) = &piloted.new_donors {
        dir.write_donors(bytes)?;
    }
    let placement = Placement {
        topology: seating.topology.clone(),
        pilot: dir.manifest().pilot.clone(),
    };
    Ok(Prepared {
        plan,
        seating,
        placement,
        donors: piloted.donors,
        bench,
        items,
        prompt_lengths,
        backend,
        judge: match runner {
            Some(runner) => Box::new(runner),
            None => Box::new(NoJudge),
        },
        dir,
        rows,
    })
}

/// What runs the programs that models write.
fn code_runner(host: &dyn Host, err: &mut dyn Write) -> Result<CodeRunner, CliError> {
    let runner = CodeRunner::find(host.python().as_deref(), Limits::default())
        .map_err(|e| CliError::Usage(e.to_string()))?;
    writeln!(
        err,
        "note: what the models write is run with {} under limits of time and memory, not in a sandbox",
        runner.python().display()
    )?;
    Ok(runner)
}

fn notes(info: &dlmom_runtime::EnsembleInfo, probed: Option<&Probe>, max_len: u32) -> Value {
    json!({
        "slots": info.slots,
        "max_len": max_len,
        "bit_invariant": info.bit_invariant,
        "bit_invariance": info.bit_invariance_reason,
        "batch_size_probe": probed.map(|p| json!({
            "rows": p.rows,
            "rows_per_second": p.rates.iter().map(|(rows, rate)| json!([rows, rate])).collect::<Vec<_>>(),
        })),
    })
}

/// Prompt tokens of one item, by agent.
pub(crate) type Prompts = Vec<Vec<u32>>;

/// What the prompts of the items take.
pub(crate) struct Lengths {
    /// Positions that the longest sample may need.
    pub(crate) max_len: u32,
    /// The first items' prompts.
    pub(crate) prompts: Vec<Prompts>,
    /// Tokens of every item's longest prompt, in their order.
    pub(crate) by_item: Vec<u32>,
}

/// Tokenises every item's prompts.
pub(crate) fn longest(
    backend: &mut dyn Backend,
    bench: &Bench,
    seating: &Seating,
    items: &[&Item],
    plan: &Plan,
    placement: &Placement,
) -> Result<Lengths, CliError> {
    let info = backend.info().clone();
    let mut by_item = Vec::with_capacity(items.len());
    let mut first = Vec::new();
    for item in items {
        let sources = seating.prompts(&bench.prompt(item));
        let mut tokens = Vec::new();
        for (&model, source) in info.agents.iter().zip(&sources) {
            let ids = backend.encode(model, source).map_err(|error| {
                CliError::Usage(format!(
                    "item {}: {error} ({})",
                    item.id,
                    info.models[model.index()].name
                ))
            })?;
            tokens.push(ids);
        }
        by_item.push(tokens.iter().map(Vec::len).max().unwrap_or(0) as u32);
        if first.len() < 128 {
            first.push(tokens);
        }
    }
    let longest = by_item.iter().copied().max().unwrap_or(0);
    let mut most = longest;
    for experiment in plan.runs() {
        let config = experiment.loop_config(placement)?;
        most = most.max(positions(backend, &config, longest)?);
    }
    let context = info
        .models
        .iter()
        .filter_map(|m| m.context)
        .min()
        .unwrap_or(u32::MAX);
    if longest >= context {
        return Err(CliError::Usage(format!(
            "the longest prompt has {longest} tokens, the smallest context {context}"
        )));
    }
    Ok(Lengths {
        max_len: most.min(context),
        prompts: first,
        by_item,
    })
}

/// Positions that a sample with prompts of up to `prompt` tokens may need in one lane.
pub(crate) fn positions(
    backend: &mut dyn Backend,
    config: &LoopConfig,
    prompt: u32,
) -> Result<u32, CliError> {
    let models: Vec<ModelId> = backend.info().agents.clone();
    let mut longest = |text: Option<&String>| -> Result<u32, CliError> {
        let mut most = 0;
        if let Some(text) = text {
            for &model in &models {
                let source = PromptSource::Text { text: text.clone() };
                most = most.max(backend.encode(model, &source)?.len() as u32);
            }
        }
        Ok(most)
    };
    let mut injected = longest(config.answer_cue.as_ref())?;
    if let Some(triggers) = &config.triggers {
        let closings = triggers.terminate_after - triggers.converge_after + 1;
        injected += closings.saturating_mul(longest(Some(&triggers.converge_text))?);
        injected += longest(Some(&triggers.terminate_text))?;
    }
    // What is handed over: at most all that was thought and printed before, or the lanes themselves.
    let handed = match config.topology.chain() {
        None => 0,
        Some(chain) => match chain.handoff {
            Handoff::Transcript => config.max_steps,
            Handoff::Text => config.max_steps.saturating_add(NOTES * chain.limit()),
            Handoff::Kv => prompt.saturating_mul(chain.limit()),
        },
    };
    Ok(prompt
        .saturating_add(handed)
        .saturating_add(config.max_steps)
        .saturating_add(injected))
}

/// Tokens that the wording around one agent's notes may take.
const NOTES: u32 = 64;

fn smallest_vocabulary(info: &EnsembleInfo) -> u32 {
    info.models.iter().map(|m| m.vocab).min().unwrap_or(0)
}

fn one_vocabulary(info: &EnsembleInfo) -> bool {
    check_vocabularies(info).is_ok()
}

/// What of a topology changes outputs; the handoff of a cell is the cell's own.
fn topology_facts(seating: &Seating) -> Result<Value, CliError> {
    let failed = |e: serde_json::Error| CliError::Failed(e.to_string());
    Ok(json!({
        "name": seating.name,
        "topology": serde_json::to_value(&seating.topology).map_err(failed)?,
        "seats": serde_json::to_value(&seating.seats).map_err(failed)?,
    }))
}

/// Takes texts of one token out of preset cells where a model has no such token, and says so.
fn leave_out_unknown(
    plan: &mut Plan,
    presets: &[Preset],
    backend: &mut dyn Backend,
    err: &mut dyn Write,
) -> Result<(), CliError> {
    for preset in presets {
        let Some(cell) = plan
            .cells
            .iter_mut()
            .find(|c| c.experiment.id == preset.name)
        else {
            continue;
        };
        for line in without_unknown(preset, &mut cell.experiment, backend)? {
            writeln!(err, "note: {line}")?;
        }
    }
    Ok(())
}

/// The same for one preset; a line for every knob that was left out.
pub(crate) fn without_unknown(
    preset: &Preset,
    experiment: &mut Experiment,
    backend: &mut dyn Backend,
) -> Result<Vec<String>, CliError> {
    let info = backend.info().clone();
    let mut lines = Vec::new();
    for knob in &preset.where_known {
        let text = match knob {
            TokenKnob::LockText => experiment.lock_text.clone(),
            TokenKnob::EnterSignal => experiment.enter_signal.as_ref().map(|s| s.text.clone()),
            TokenKnob::ExitSignal => experiment.exit_signal.as_ref().map(|s| s.text.clone()),
        };
        let Some(text) = text else { continue };
        let source = PromptSource::Text { text: text.clone() };
        let mut unknown = None;
        for &model in &info.agents {
            let tokens = backend.encode(model, &source)?.len();
            if tokens != 1 {
                unknown = Some((info.models[model.index()].name.clone(), tokens));
                break;
            }
        }
        let Some((model, tokens)) = unknown else {
            continue;
        };
        match knob {
            TokenKnob::LockText => experiment.lock_text = None,
            TokenKnob::EnterSignal => experiment.enter_signal = None,
            TokenKnob::ExitSignal => experiment.exit_signal = None,
        }
        lines.push(format!(
            "{}: {} is left out: {text:?} is {tokens} tokens for {model}, not one",
            preset.name,
            knob.as_str()
        ));
    }
    Ok(lines)
}

/// Seeds a cell runs with: the first of the run where nothing is drawn.
pub(crate) fn seeds_of(experiment: &Experiment, seeds: &[u64], first: u64) -> Vec<u64> {
    if experiment.is_deterministic() {
        vec![first]
    } else {
        seeds.to_vec()
    }
}
