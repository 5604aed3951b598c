//! The one clap tree: console script, `python -m dlmom_rs` and the Python-free binary share it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use dlmom_core::{AlphaUnit, Gate};
use dlmom_runtime::{Handoff, Support, WireEncoding};

use crate::calibrate::CalibrateArgs;
use crate::compare::CompareArgs;
use crate::completions::CompletionsArgs;
use crate::doctor::DoctorArgs;
use crate::generate::GenerateArgs;
use crate::list::ListArgs;
use crate::packet::PacketArgs;
use crate::replay::ReplayArgs;
use crate::schema::SchemaArgs;
use crate::show::ShowArgs;
use crate::validate::ValidateArgs;

/// Deep-Latent Mixture of Models: frozen language models that reason together in latent space.
#[derive(Debug, Parser)]
#[command(
    name = "dlmom-rs",
    version,
    long_version = crate::build::LONG_VERSION,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run ablation suites over a benchmark and record every sample.
    Run(Box<RunArgs>),
    /// Fold the raw files of one or more runs into tables (CSV, LaTeX).
    Aggregate(AggregateArgs),
    /// Draw the figures of a run from its raw files.
    Plot(PlotArgs),
    /// Compare cells over shared samples, of one run or of two.
    Compare(CompareArgs),
    /// Find the Dirichlet concentration whose noise has a given strength.
    Calibrate(Box<CalibrateArgs>),
    /// Answer a prompt and show how the experts came to it.
    Generate(Box<GenerateArgs>),
    /// Print one recorded sample's timeline.
    Show(ShowArgs),
    /// Decide the modes of recorded samples again, with other controller knobs.
    Replay(Box<ReplayArgs>),
    /// Inspect, write and read belief packets.
    Packet(PacketArgs),
    /// Check a run folder, a suites file or a packet file.
    Validate(ValidateArgs),
    /// List suites, experiments, benchmarks and experts.
    List(ListArgs),
    /// Say what this machine has and what is missing.
    Doctor(DoctorArgs),
    /// Print the JSON schema of a file this program reads or writes.
    Schema(SchemaArgs),
    /// Print a completion script for a shell.
    Completions(CompletionsArgs),
}

/// What computes the forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendKind {
    /// The models, by the Python package.
    Python,
    /// No model: logits from a fixed function, whatever the words of --experts name.
    Mock,
}

/// Where forwards run, for `--device`: a name, or one for each expert.
///
/// # Errors
/// What is expected instead.
pub fn devices(text: &str) -> Result<String, String> {
    let is_device = |name: &str| {
        let (kind, number) = name
            .split_once(':')
            .map_or((name, None), |(kind, n)| (kind, Some(n)));
        let is_number = |n: &str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit());
        match kind {
            "cuda" | "hip" => number.is_none_or(is_number),
            "auto" | "cpu" | "mps" => number.is_none(),
            _ => false,
        }
    };
    if text.split(',').all(is_device) {
        Ok(text.to_owned())
    } else {
        Err("give auto, cpu, cuda, hip or mps, cuda:1 or hip:1 for one of several, and commas between those of several experts".into())
    }
}

/// Storage type of weights and KV caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// float16.
    Fp16,
    /// float32.
    Fp32,
}

/// How progress is shown, on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DisplayKind {
    /// A live panel; plain lines where standard error is no terminal.
    Rich,
    /// A line every few seconds and one per finished cell.
    Plain,
    /// One JSON object a line.
    Log,
    /// Nothing but errors.
    None,
}

/// Rule of the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GateWord {
    /// Latent where the entropy is above alpha.
    Threshold,
    /// Slope, mean and variance of the last w entropies.
    Trend,
    /// The entropy against that of the block's first step.
    Reference,
    /// One latent block, left for good.
    LatentThenExplicit,
    /// Latent until the latent budget is spent.
    AlwaysLatent,
    /// Never latent.
    AlwaysExplicit,
}

impl From<GateWord> for Gate {
    fn from(word: GateWord) -> Self {
        match word {
            GateWord::Threshold => Self::Threshold,
            GateWord::Trend => Self::Trend,
            GateWord::Reference => Self::Reference,
            GateWord::LatentThenExplicit => Self::LatentThenExplicit,
            GateWord::AlwaysLatent => Self::AlwaysLatent,
            GateWord::AlwaysExplicit => Self::AlwaysExplicit,
        }
    }
}

/// Order in which items are worked on; no output depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// Longest prompt first, so that the last samples are short ones.
    Longest,
    /// As in the file.
    Given,
    /// Last item first.
    Reversed,
}

/// Rows of the running batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    /// Probe once for the best throughput.
    Auto,
    /// Exactly this many.
    Rows(u32),
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Suites to run, in the order baselines, REF, A1, A2, A3, A4.
    #[arg(long, num_args = 1.., required_unless_present_any = ["only", "preset"], value_name = "SUITE")]
    pub suite: Vec<String>,
    /// Only these cells of the suites (REF always runs).
    #[arg(long, num_args = 1.., value_name = "ID")]
    pub only: Vec<String>,
    /// Published methods, each a cell of its own beside those of the suites (`list presets`).
    #[arg(long, num_args = 1.., value_name = "NAME")]
    pub preset: Vec<String>,
    /// Suites file instead of the built-in ones.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Experts of an ensemble: local paths, hub ids or zoo:NAME.
    #[arg(long, num_args = 1.., value_name = "MODEL", required_unless_present = "model", conflicts_with = "model")]
    pub experts: Vec<String>,
    /// A single model for every agent: local path, hub id or zoo:NAME.
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Who the agents are and how they meet: a name (`list topologies`) or a file [default: sequential with --model, lockstep with --experts].
    #[arg(long, value_name = "NAME|FILE")]
    pub topology: Option<String>,
    /// Benchmark: tinygsm, tinycode or tinymc, or gsm8k:PATH, humaneval:PATH or arc:PATH for a JSONL file.
    #[arg(long, value_name = "BENCH")]
    pub bench: String,
    /// Run folder.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Continue the run in --out: skip what is done, repair a torn last line.
    #[arg(long)]
    pub resume: bool,
    /// What computes the forwards; mock needs no model and no Python, and its answers mean nothing.
    #[arg(long, value_enum, default_value_t = BackendKind::Python)]
    pub backend: BackendKind,
    /// Where the forwards run: auto (the first of cuda or hip, mps, cpu that is there), cpu, cuda, hip (an AMD GPU) or mps;
    /// cuda:1 for one of several; cuda:0,cuda:1 for one for each expert.
    #[arg(long, value_parser = devices, default_value = "auto", value_name = "DEVICE")]
    pub device: String,
    /// Storage type of weights and KV caches.
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    pub dtype: Dtype,
    /// Run seeds; cells in which nothing is drawn run once, with the first.
    #[arg(long, num_args = 1.., default_values_t = [0], value_name = "SEED")]
    pub seeds: Vec<u64>,
    /// Most latent and explicit steps of a sample together.
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_steps: u32,
    /// Most latent steps of a sample.
    #[arg(long, value_name = "N")]
    pub max_latent_steps: Option<u32>,
    /// Most handoffs of a sample, in a sequential topology [default: the length of the chain less one].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub max_handoffs: Option<u32>,
    /// What an agent hands to the next, in a sequential topology, for every cell that does not say.
    #[arg(long, value_parser = handoff, value_name = "transcript|text|kv")]
    pub handoff: Option<Handoff>,
    /// Cap on mode switches for cells that name none; -1 is unlimited.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub max_switches: Option<i64>,
    /// Rows of the running batch, or auto to probe once.
    #[arg(long, default_value = "32", value_name = "N|auto", value_parser = batch_size)]
    pub batch_size: BatchSize,
    /// Only the first N items.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Only N items spread evenly over the benchmark.
    #[arg(long, value_name = "N", conflicts_with = "limit")]
    pub pilot: Option<usize>,
    /// Order in which items are worked on; no output depends on it.
    #[arg(long, value_enum, default_value_t = Order::Longest)]
    pub order: Order,
    /// Entropy threshold for every cell that names none.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub alpha: Option<f64>,
    /// Unit of alpha; quantile ranks entropies among those of a pilot of the reference pipeline.
    #[arg(long, value_parser = alpha_unit, value_name = "normalized|nats|quantile")]
    pub alpha_unit: Option<AlphaUnit>,
    /// Items of the pilot, taken from those that are not run where there are enough.
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub pilot_items: usize,
    /// Items per cell whose drift from the reference pipeline is measured.
    #[arg(
        long,
        default_value_t = 0,
        value_name = "N",
        allow_negative_numbers = true
    )]
    pub drift: usize,
    /// How packets and whole-vocabulary messages are written, for every cell that does not say.
    #[arg(long, value_parser = encoding, value_name = "f32|f16|bf16|compact")]
    pub encoding: Option<WireEncoding>,
    /// What consensus sees of an agent, for every cell that does not say: every logit, or only its message.
    #[arg(long, value_parser = support, value_name = "full|packet")]
    pub support: Option<Support>,
    /// Say what would run, and stop.
    #[arg(long)]
    pub dry_run: bool,
    /// Demand bit-equal rows whatever the batch on a device (on a CPU that is the default).
    #[arg(long, conflicts_with = "fast")]
    pub deterministic: bool,
    /// Give up bit-equal rows for speed.
    #[arg(long)]
    pub fast: bool,
    /// How progress is shown [default: rich on a terminal, else plain].
    #[arg(long, value_enum)]
    pub display: Option<DisplayKind>,
    /// Threads of one forward [default: physical cores].
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// Items per cell whose steps are recorded in traces/.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub traces: usize,
    /// Attention implementation [default: blocks where rows share a batch on a CPU, else sdpa, else eager].
    #[arg(long, value_parser = ["blocks", "sdpa", "eager"], value_name = "blocks|sdpa|eager")]
    pub attention: Option<String>,
    /// What reads logits: rust on the host, torch or triton where they are [default: triton on a GPU that can, else torch
    /// there, else rust].
    #[arg(long, value_parser = ["rust", "torch", "triton"], value_name = "rust|torch|triton")]
    pub kernel: Option<String>,
    /// Capture steps, from packets to readouts, and replay them, on a GPU (not yet measured on any).
    #[arg(long)]
    pub graphs: bool,
    /// Allow a model folder to run its own Python code.
    #[arg(long)]
    pub trust_remote_code: bool,
}

/// Arguments of `aggregate`.
#[derive(Debug, Args)]
pub struct AggregateArgs {
    /// Run folders.
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// Folder of aggregate.csv, aggregate_wide.csv and aggregate.tex [default: the first run].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Arguments of `plot`.
#[derive(Debug, Args)]
pub struct PlotArgs {
    /// Run folder.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Folder of the figures [default: RUN/figs].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// File formats.
    #[arg(long, num_args = 1.., default_values_t = ["png".to_owned()], value_parser = ["png", "svg", "pdf"], value_name = "png|svg|pdf")]
    pub format: Vec<String>,
    /// Look of the figures: default, or paper for a single column in print.
    #[arg(long, default_value = "default", value_parser = ["default", "paper"], value_name = "default|paper")]
    pub style: String,
    /// Draw the timeline of one recorded sample of this cell instead.
    #[arg(long, value_name = "ID", requires = "item")]
    pub trace: Option<String>,
    /// The sample's item.
    #[arg(long, value_name = "ITEM", requires = "trace")]
    pub item: Option<String>,
    /// The sample's seed [default: the first recorded].
    #[arg(long, value_name = "SEED", requires = "trace")]
    pub seed: Option<u64>,
}

fn batch_size(text: &str) -> Result<BatchSize, String> {
    if text == "auto" {
        return Ok(BatchSize::Auto);
    }
    match text.parse::<u32>() {
        Ok(rows @ 1..=4096) => Ok(BatchSize::Rows(rows)),
        _ => Err("give auto or a number from 1 to 4096".into()),
    }
}

pub(crate) fn encoding(text: &str) -> Result<WireEncoding, String> {
    match text {
        "f32" => Ok(WireEncoding::F32),
        "f16" => Ok(WireEncoding::F16),
        "bf16" => Ok(WireEncoding::Bf16),
        "compact" => Ok(WireEncoding::Compact),
        _ => Err("give f32, f16, bf16 or compact".into()),
    }
}

pub(crate) fn support(text: &str) -> Result<Support, String> {
    match text {
        "full" => Ok(Support::Full),
        "packet" => Ok(Support::Packet),
        _ => Err("give full or packet".into()),
    }
}

pub(crate) fn alpha_unit(text: &str) -> Result<AlphaUnit, String> {
    match text {
        "normalized" => Ok(AlphaUnit::Normalized),
        "nats" => Ok(AlphaUnit::Nats),
        "quantile" => Ok(AlphaUnit::Quantile),
        _ => Err("give normalized, nats or quantile".into()),
    }
}

pub(crate) fn handoff(text: &str) -> Result<Handoff, String> {
    match text {
        "transcript" => Ok(Handoff::Transcript),
        "text" => Ok(Handoff::Text),
        "kv" => Ok(Handoff::Kv),
        _ => Err("give transcript, text or kv".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_one_for_all_or_one_for_each() {
        for text in [
            "auto",
            "cpu",
            "mps",
            "cuda",
            "hip:0",
            "cuda:0,cuda:12",
            "cpu,cuda",
        ] {
            assert_eq!(devices(text).as_deref(), Ok(text));
        }
        for text in [
            "", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "cpu:0", "auto:0", "cpu,",
            "cpu, cpu", "CPU",
        ] {
            let error = devices(text);
            assert!(
                error.is_err_and(|line| line.starts_with("give auto, cpu")),
                "{text}"
            );
        }
    }
}
