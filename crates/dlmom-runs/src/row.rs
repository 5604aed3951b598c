//! The raw row: one line of `raw/<ID>.jsonl` per (item, seed, sample).

use dlmom_eval::{CodeJudge, EXTRACTOR_VERSION, Item, JudgeError, Method, grade, read};
use dlmom_runtime::{JobKey, MemoryStats, Outcome, Stop, Trigger};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::registry::Experiment;

/// Version of [`RawRow`].
pub const ROW_SCHEMA_VERSION: u32 = 2;

/// Fields that depend on when and where a row was made, not on what it holds.
pub const VOLATILE_FIELDS: [&str; 5] = [
    "latency_s",
    "peak_device_bytes",
    "peak_rss_bytes",
    "batch_size",
    "started_at",
];

/// Why a sample has no answer to grade.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// NaN or Inf in an expert's logits.
    NanInf,
    /// Out of steps, context or handoffs without an answer.
    Timeout,
    /// Ended by itself without an answer that the extractor can read, or with a program that does not compile.
    ParseFailure,
    /// The prompt or the backend failed.
    BackendError,
}

impl Failure {
    /// All labels, in the order of tables.
    pub const ALL: [Self; 4] = [
        Self::NanInf,
        Self::Timeout,
        Self::ParseFailure,
        Self::BackendError,
    ];

    /// The label in files.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::NanInf => "nan_inf",
            Self::Timeout => "timeout",
            Self::ParseFailure => "parse_failure",
            Self::BackendError => "backend_error",
        }
    }
}

/// Normalised entropy (`H / ln V`, mean of the experts) over the steps of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EntropySpread {
    /// Mean.
    pub mean: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

/// Drift from the reference pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Drift {
    /// Mean KL divergence in nats.
    pub kl: f64,
    /// Mean cosine of the preferences.
    pub cosine: f64,
    /// Steps beyond the drift threshold.
    pub events: u32,
}

/// One sample, flat. Keys keep this order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "dlmom-rs raw row")]
pub struct RawRow {
    /// Version of this schema.
    pub schema_version: u32,
    /// Id of the cell.
    pub experiment: String,
    /// Suite of the cell.
    pub suite: String,
    /// Name of the benchmark.
    pub bench: String,
    /// Digest of everything that changes outputs.
    pub config_hash: String,
    /// Stable id of the benchmark item.
    pub item_id: String,
    /// Run seed.
    pub seed: u64,
    /// Index among several samples of one item and seed.
    pub sample: u32,
    /// No draw could change the output: other seeds would give the same row.
    pub deterministic: bool,
    /// Version of the answer extractor.
    pub extractor_version: u32,
    /// The strict answer is right; false for every failure.
    pub correct: bool,
    /// The flexible answer is right; false for every failure.
    pub correct_flexible: bool,
    /// The answer in a format that was asked for: a canonical number, a letter, or the source of the program that was judged,
    /// with what the prompt holds before it; null is none.
    pub answer: Option<String>,
    /// The answer by any rule; null is none.
    pub answer_flexible: Option<String>,
    /// The rule that found the flexible answer.
    #[schemars(schema_with = "method_schema")]
    pub answer_method: Method,
    /// Gold answer: as the data set writes it, or the letter shown for the right option, or the reference solution.
    pub gold: String,
    /// Printed text.
    pub text: String,
    /// Why there is nothing to grade; null where there is.
    pub failure: Option<Failure>,
    /// Detail of a failure, one line.
    pub error: Option<String>,
    /// How the sample ended.
    #[schemars(schema_with = "stop_schema")]
    pub stop: Stop,
    /// Printed tokens, of all agents.
    pub explicit_tokens: u32,
    /// Tokens of injected texts, fed and not counted as printed.
    #[serde(default)]
    pub injected_tokens: u32,
    /// Latent steps.
    pub latent_steps: u32,
    /// `explicit_tokens + latent_steps`.
    pub total_steps: u32,
    /// Lengths of the latent segments, in order.
    pub latent_segments: Vec<u32>,
    /// Prompt tokens, summed over agents.
    pub prompt_tokens: u64,
    /// Changes of mode.
    pub switches: u32,
    /// Lengths of stretches of equal mode: explicit, latent, explicit and so on, the first possibly 0.
    #[serde(default)]
    pub mode_runs: Vec<u32>,
    /// Handoffs between agents.
    pub handoffs: u32,
    /// Why each of them happened, in order.
    #[serde(default)]
    pub handoff_triggers: Vec<Trigger>,
    /// Bytes handed over between agents.
    #[serde(default)]
    pub handoff_bytes: u64,
    /// Positions forwarded, prompts included, summed over agents.
    pub forward_tokens: u64,
    /// The same by agent.
    pub forward_tokens_per_agent: Vec<u32>,
    /// Bytes the experts sent to consensus.
    pub uplink_bytes: u64,
    /// Bytes consensus sent to the experts.
    pub downlink_bytes: u64,
    /// Normalised entropy over steps; null without a step, or where it is not finite because the sample failed with `nan_inf`.
    pub entropy: Option<EntropySpread>,
    /// Counts of normalised entropies: below 1e-5, then 4 bins a decade up to 1, then 1 itself.
    pub entropy_hist: Vec<u32>,
    /// Mean top-k mass over latent steps; null without any.
    pub topk_mass: Option<f64>,
    /// Mean `KL(fed || packet)` of filter, noise and control over latent steps, nats; null without any, and where what was fed
    /// has tokens that the packet lacks.
    pub noise_kl: Option<f64>,
    /// Mean Jensen-Shannon divergence of the same, nats; null without latent steps.
    #[serde(default)]
    pub noise_js: Option<f64>,
    /// Share of steps in which all experts have the same most probable token; null for one expert.
    #[serde(default)]
    pub agreement: Option<f64>,
    /// Share of steps in which experts were merged; null for one expert.
    #[serde(default)]
    pub merge_rate: Option<f64>,
    /// Drift from the reference pipeline; null where it was not measured.
    pub drift: Option<Drift>,
    /// Wall time from admission to finish, seconds.
    pub latency_s: f64,
    /// Highest device allocation so far; null on a CPU.
    pub peak_device_bytes: Option<u64>,
    /// Highest resident set of the process so far.
    pub peak_rss_bytes: Option<u64>,
    /// Slots of the running batch.
    pub batch_size: u32,
    /// Start, seconds since the Unix epoch.
    pub started_at: f64,
}

fn method_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "enum": [
            "boxed", "hashes", "phrase", "last_number", "marked", "option_text", "code_block", "definition", "continuation", "none",
            "truncated_reasoning",
        ],
    })
}

fn stop_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "enum": ["eos", "budget", "context", "nan_inf", "prompt", "backend", "handoffs"],
    })
}

/// What a row says besides the outcome.
#[derive(Clone, Copy, Debug)]
pub struct RowContext<'a> {
    /// The cell.
    pub experiment: &'a Experiment,
    /// Its digest, from [`Experiment::config_hash`].
    pub config_hash: &'a str,
    /// Name of the benchmark.
    pub bench: &'a str,
    /// Slots of the running batch.
    pub batch_size: u32,
    /// Memory at the end of the sample.
    pub memory: MemoryStats,
    /// Drift of this sample, where it was measured.
    pub drift: Option<Drift>,
}

/// An outcome that cannot be recorded.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RowError {
    /// A number that JSON cannot hold, in a sample that did not fail numerically.
    #[error("item {item_id}, seed {seed}: {field} is {value}, not a finite number")]
    NonFinite {
        /// The item.
        item_id: String,
        /// The seed.
        seed: u64,
        /// The field.
        field: &'static str,
        /// The value.
        value: f64,
    },
    /// The outcome belongs to another item.
    #[error("outcome of item {outcome} was paired with item {item}")]
    WrongItem {
        /// The outcome's item.
        outcome: String,
        /// The item given.
        item: String,
    },
    /// The answer could not be judged. That is no failure of the sample, so there is no row.
    #[error("item {item_id}, seed {seed}: {source}")]
    Judge {
        /// The item.
        item_id: String,
        /// The seed.
        seed: u64,
        /// Why.
        source: JudgeError,
    },
}

impl RawRow {
    /// Extracts, grades and labels an outcome.
    ///
    /// The label is `nan_inf` and `backend_error` by how the sample stopped; else, without a flexible answer, `timeout` where
    /// steps or context ran out and `parse_failure` otherwise. Failed samples are wrong, whatever their text says. `judge` is
    /// asked about programs only, and only where the sample did not fail; it takes the time that the program takes.
    ///
    /// # Errors
    /// [`RowError`].
    pub fn new(
        context: &RowContext<'_>,
        outcome: &Outcome,
        item: &Item,
        judge: &mut dyn CodeJudge,
    ) -> Result<Self, RowError> {
        if outcome.key.item_id != item.id {
            return Err(RowError::WrongItem {
                outcome: outcome.key.item_id.clone(),
                item: item.id.clone(),
            });
        }
        let finite = |field, value: f64| {
            if value.is_finite() {
                return Ok(value);
            }
            let JobKey { item_id, seed, .. } = outcome.key.clone();
            Err(RowError::NonFinite {
                item_id,
                seed,
                field,
                value,
            })
        };
        let numeric_failure = outcome.stop == Stop::NanInf;
        // Means over the steps of a sample that met NaN or Inf may be such themselves; the label says so.
        let optional = |field, value: Option<f64>| match value {
            Some(v) if numeric_failure && !v.is_finite() => Ok(None),
            Some(v) => finite(field, v).map(Some),
            None => Ok(None),
        };
        let broken = matches!(outcome.stop, Stop::NanInf | Stop::Prompt | Stop::Backend);
        let grade = if broken {
            read(item, &outcome.text)
        } else {
            grade(item, &outcome.text, judge).map_err(|source| RowError::Judge {
                item_id: outcome.key.item_id.clone(),
                seed: outcome.key.seed,
                source,
            })?
        };
        let failure = failure_of(outcome.stop, grade.answer_flexible.is_some());
        let entropy = entropy_of(outcome, finite)?;
        let experiment = context.experiment;
        Ok(Self {
            schema_version: ROW_SCHEMA_VERSION,
            experiment: experiment.id.clone(),
            suite: experiment.suite.clone(),
            bench: context.bench.to_owned(),
            config_hash: context.config_hash.to_owned(),
            item_id: outcome.key.item_id.clone(),
            seed: outcome.key.seed,
            sample: outcome.key.sample,
            deterministic: experiment.is_deterministic(),
            extractor_version: EXTRACTOR_VERSION,
            correct: grade.correct && failure.is_none(),
            correct_flexible: grade.correct_flexible && failure.is_none(),
            answer: grade.answer,
            answer_flexible: grade.answer_flexible,
            answer_method: grade.method,
            gold: item.gold.clone(),
            text: outcome.text.clone(),
            failure,
            error: outcome.error.as_deref().map(one_line),
            stop: outcome.stop,
            explicit_tokens: outcome.explicit_tokens,
            injected_tokens: outcome.injected_tokens,
            latent_steps: outcome.latent_steps,
            total_steps: outcome.total_steps(),
            latent_segments: outcome.latent_segments.clone(),
            prompt_tokens: sum(&outcome.prompt_tokens),
            switches: outcome.switches,
            mode_runs: outcome.schedule.runs().to_vec(),
            handoffs: outcome.handoffs,
            handoff_triggers: outcome.handoff_log.iter().map(|h| h.trigger).collect(),
            handoff_bytes: outcome.handoff_bytes,
            forward_tokens: sum(&outcome.forward_tokens),
            forward_tokens_per_agent: outcome.forward_tokens.clone(),
            uplink_bytes: outcome.uplink_bytes,
            downlink_bytes: outcome.downlink_bytes,
            entropy,
            entropy_hist: outcome.entropy_hist.clone(),
            topk_mass: optional("topk_mass", outcome.topk_mass)?,
            noise_kl: optional("noise_kl", outcome.noise_kl)?,
            noise_js: optional("noise_js", outcome.noise_js)?,
            agreement: optional("agreement", outcome.agreement)?,
            merge_rate: optional("merge_rate", outcome.merge_rate)?,
            drift: context.drift,
            latency_s: finite("latency_s", outcome.latency_s)?,
            peak_device_bytes: context.memory.peak_device_bytes,
            peak_rss_bytes: context.memory.peak_rss_bytes,
            batch_size: context.batch_size,
            started_at: finite("started_at", outcome.started_at)?,
        })
    }

    /// The identity of the sample within its experiment.
    #[must_use]
    pub fn key(&self) -> JobKey {
        JobKey {
            item_id: self.item_id.clone(),
            seed: self.seed,
            sample: self.sample,
        }
    }

    /// The row without [`VOLATILE_FIELDS`]: equal for two runs of one configuration.
    ///
    /// # Errors
    /// Never for a row made by [`RawRow::new`] or read from a file.
    pub fn deterministic_view(&self) -> Result<Value, serde_json::Error> {
        let mut value = serde_json::to_value(self)?;
        if let Value::Object(map) = &mut value {
            map.retain(|key, _| !VOLATILE_FIELDS.contains(&key.as_str()));
        }
        Ok(value)
    }
}

fn failure_of(stop: Stop, answered: bool) -> Option<Failure> {
    match stop {
        Stop::NanInf => Some(Failure::NanInf),
        Stop::Prompt | Stop::Backend => Some(Failure::BackendError),
        _ if answered => None,
        Stop::Budget | Stop::Context | Stop::Handoffs => Some(Failure::Timeout),
        Stop::Eos => Some(Failure::ParseFailure),
    }
}

fn entropy_of(
    outcome: &Outcome,
    finite: impl Fn(&'static str, f64) -> Result<f64, RowError>,
) -> Result<Option<EntropySpread>, RowError> {
    let spread = outcome.entropy;
    let all_finite = spread.mean.is_finite() && spread.min.is_finite() && spread.max.is_finite();
    let unseen = outcome.entropy_hist.iter().all(|count| *count == 0);
    if unseen || (outcome.stop == Stop::NanInf && !all_finite) {
        return Ok(None);
    }
    Ok(Some(EntropySpread {
        mean: finite("entropy.mean", spread.mean)?,
        min: finite("entropy.min", spread.min)?,
        max: finite("entropy.max", spread.max)?,
    }))
}

fn sum(counts: &[u32]) -> u64 {
    counts.iter().map(|c| u64::from(*c)).sum()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
