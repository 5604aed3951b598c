//! From arguments to a loaded, checked and reserved run: everything that can be wrong is found before a sample runs.

use std::collections::HashMap;
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
    Experiment, Invocation, Manifest, ManifestCell, Overrides, Plan, Registry, RunDir, RunDirError,
    Setting, read_manifest,
};
use dlmom_runtime::{AgentId, Backend, LoopConfig, PromptSource, check_vocabularies};
use serde_json::{Value, json};

use crate::args::{BatchSize, Device, Dtype, Order, RunArgs};
use crate::host::{EngineSpec, Host};
use crate::mock;
use crate::probe::{Probe, probe};
use crate::status::CliError;

/// Rows that the engine makes ready before the prompts are known.
const FIRST_SLOTS: u32 = 8;

/// A run that can start.
pub(crate) struct Prepared {
    pub(crate) plan: Plan,
    pub(crate) bench: Bench,
    pub(crate) items: Vec<Item>,
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

impl Device {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Hip => "hip",
            Self::Mps => "mps",
        }
    }
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
    pub(crate) bench: Bench,
    /// Whether answers are programs that have to be run.
    pub(crate) runs_code: bool,
    pub(crate) items: Vec<Item>,
    pub(crate) data_sha256: String,
    pub(crate) experts: Vec<String>,
}

pub(crate) fn select(args: &RunArgs, host: &dyn Host) -> Result<Selection, CliError> {
    if args.max_handoffs.is_some() {
        return Err(CliError::Usage(
            "--max-handoffs: handoffs between agents (sequential topology) are not built yet"
                .into(),
        ));
    }
    if args
        .seeds
        .iter()
        .enumerate()
        .any(|(i, s)| args.seeds[..i].contains(s))
    {
        return Err(CliError::Usage("--seeds: a seed is named twice".into()));
    }
    for (flag, value) in [("--limit", args.limit), ("--pilot", args.pilot)] {
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
    let experts = match &args.model {
        Some(model) => vec![model.clone()],
        None => args.experts.clone(),
    };
    let registry = match &args.config {
        Some(path) => Registry::load(path)?,
        None => Registry::builtin()?,
    };
    // Lockstep agents that name one and the same model share its weights.
    let shared_model = experts.iter().all(|e| *e == experts[0]);
    let setting = Setting {
        shared_model,
        experts: experts.len(),
    };
    let overrides = Overrides {
        alpha: args.alpha,
        alpha_unit: args.alpha_unit,
        max_switches: args.max_switches,
        max_steps: Some(args.max_steps),
        max_latent_steps: args.max_latent_steps,
        encoding: args.encoding,
        support: args.support,
        ..Overrides::default()
    };
    let plan = registry.expand(&args.suite, &args.only, setting, &overrides)?;
    plan.check_supported()?;
    for experiment in plan.runs() {
        experiment
            .loop_config()?
            .validate(None)
            .map_err(|e| CliError::Usage(format!("{}: {e}", experiment.id)))?;
    }
    let spec = BenchSpec::parse(&args.bench)?;
    let path: PathBuf = match spec.path() {
        Some(path) => path.to_owned(),
        None => host
            .data_dir()
            .ok_or_else(|| {
                CliError::Usage(format!(
                    "{}: shipped with the Python package only",
                    args.bench
                ))
            })?
            .join(format!("{}.jsonl", spec.info().name())),
    };
    let ItemSet { items, data_sha256 } = load(spec.schema(), &path)?;
    let items = choose(items, args);
    Ok(Selection {
        plan,
        bench: spec.bench(),
        runs_code: spec.info().runs_code(),
        items,
        data_sha256,
        experts,
    })
}

fn choose(items: Vec<Item>, args: &RunArgs) -> Vec<Item> {
    let total = items.len();
    let mut chosen: Vec<Item> = match (args.limit, args.pilot) {
        (Some(limit), _) => items.into_iter().take(limit).collect(),
        (None, Some(pilot)) if pilot < total => {
            let wanted: Vec<usize> = (0..pilot).map(|i| i * total / pilot).collect();
            items
                .into_iter()
                .enumerate()
                .filter(|(i, _)| wanted.binary_search(i).is_ok())
                .map(|(_, item)| item)
                .collect()
        }
        _ => items,
    };
    if args.order == Order::Reversed {
        chosen.reverse();
    }
    chosen
}

/// The models in the order they are loaded, and every agent's.
pub(crate) fn models_and_agents(experts: &[String]) -> (Vec<String>, Vec<u32>) {
    let mut models: Vec<String> = Vec::new();
    let mut seen: HashMap<&str, u32> = HashMap::new();
    let agents = experts
        .iter()
        .map(|expert| {
            *seen.entry(expert).or_insert_with(|| {
                models.push(expert.clone());
                models.len() as u32 - 1
            })
        })
        .collect();
    (models, agents)
}

pub(crate) fn prepare(
    args: &RunArgs,
    argv: &[String],
    selection: Selection,
    host: &mut dyn Host,
    err: &mut dyn Write,
) -> Result<Prepared, CliError> {
    let Selection {
        plan,
        bench,
        runs_code,
        items,
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
    let (models, agents) = models_and_agents(&experts);
    let spec = EngineSpec {
        experts: models,
        agents,
        device: args.device.name().into(),
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
    };
    let mut backend = mock::load(args, &spec, host, err)?;
    check_vocabularies(backend.info())?;
    let vocab = backend.info().model_of(AgentId(0)).map_or(0, |m| m.vocab);
    for experiment in plan.runs() {
        let config = experiment.loop_config()?;
        config
            .validate(Some(vocab))
            .map_err(|e| CliError::Usage(format!("{}: {e}", experiment.id)))?;
    }
    let (max_len, prompts) = longest(&mut *backend, &bench, &items, &plan)?;
    let (rows, probed) = match (args.batch_size, &recorded) {
        (BatchSize::Rows(rows), _) => (rows, None),
        (BatchSize::Auto, Some(recorded)) => (recorded.batch_size, None),
        (BatchSize::Auto, None) => {
            let k = plan.runs().map(|e| e.k).max().unwrap_or(1).unsigned_abs() as u32;
            let found = probe(&mut *backend, &prompts, max_len, k, &ConsensusSpec::paper())?;
            (found.rows, Some(found))
        }
    };
    backend.reserve(rows, max_len)?;
    let info = backend.info().clone();
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
        ln_vocab: Some(f64::from(vocab).ln()),
        cells: ManifestCell::of_plan(&plan, &context)?,
        context,
        environment,
        invocations: vec![Invocation {
            argv: argv.to_vec(),
            started_at: now(),
            finished_at: None,
        }],
        notes: notes(&info, probed.as_ref(), max_len),
    };
    let dir = RunDir::open(&args.out, &plan, manifest, args.resume)?;
    Ok(Prepared {
        plan,
        bench,
        items,
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
type Prompts = Vec<Vec<u32>>;

/// Positions that the longest sample may need, and the first items' prompts.
fn longest(
    backend: &mut dyn Backend,
    bench: &Bench,
    items: &[Item],
    plan: &Plan,
) -> Result<(u32, Vec<Prompts>), CliError> {
    let info = backend.info().clone();
    let mut longest = 0;
    let mut first = Vec::new();
    for item in items {
        let source = bench.prompt(item);
        let mut tokens = Vec::new();
        for &model in &info.agents {
            let ids = backend.encode(model, &source).map_err(|error| {
                CliError::Usage(format!(
                    "item {}: {error} ({})",
                    item.id,
                    info.models[model.index()].name
                ))
            })?;
            longest = longest.max(ids.len() as u32);
            tokens.push(ids);
        }
        if first.len() < 128 {
            first.push(tokens);
        }
    }
    let mut steps = 0;
    for experiment in plan.runs() {
        let LoopConfig {
            max_steps,
            answer_cue,
            ..
        } = experiment.loop_config()?;
        let mut cue = 0;
        if let Some(text) = answer_cue {
            for &model in &info.agents {
                let source = PromptSource::Text { text: text.clone() };
                cue = cue.max(backend.encode(model, &source)?.len() as u32);
            }
        }
        steps = steps.max(max_steps + cue);
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
    Ok((longest.saturating_add(steps).min(context), first))
}

/// Seeds a cell runs with: the first of the run where nothing is drawn.
pub(crate) fn seeds_of(experiment: &Experiment, seeds: &[u64], first: u64) -> Vec<u64> {
    if experiment.is_deterministic() {
        vec![first]
    } else {
        seeds.to_vec()
    }
}
