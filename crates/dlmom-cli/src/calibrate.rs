//! `calibrate`: the Dirichlet concentration whose noise has a given strength on the packets of a pilot.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use dlmom_core::{AlphaUnit, FilterSpec, NoiseSpec, Stream, noise, sample_key};
use dlmom_eval::stats::{mean, quantile};
use dlmom_eval::{BenchSpec, Item, ItemSet, load};
use dlmom_packet::BeliefPacket;
use dlmom_runs::{Overrides, Pilot, Placement, REF, Registry, SoftMode};
use dlmom_runtime::{Donors, check_config};
use serde_json::json;

use crate::args::{BackendKind, Dtype, alpha_unit, devices};
use crate::host::{EngineSpec, Host};
use crate::mock;
use crate::pilot::{self, Surroundings, Wanted};
use crate::prepare::{longest, models_and_agents, seat, setting};
use crate::report::table;
use crate::status::{CliError, ExitStatus};

/// Concentrations between which one is looked for.
const LEAST: f64 = 1e-3;
const MOST: f64 = 1e7;
/// Halvings of the interval, on a logarithmic scale: 23 / 2^40 is far below any use.
const HALVINGS: u32 = 40;

/// Arguments of `calibrate`.
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// Experts of an ensemble: local paths, hub ids or zoo:NAME.
    #[arg(long, num_args = 1.., value_name = "MODEL", required_unless_present = "model", conflicts_with = "model")]
    pub experts: Vec<String>,
    /// A single model for every agent: local path, hub id or zoo:NAME.
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Who the agents are and how they meet: a name or a file [default: sequential with --model, lockstep with --experts].
    #[arg(long, value_name = "NAME|FILE")]
    pub topology: Option<String>,
    /// Benchmark, as for run.
    #[arg(long, value_name = "BENCH")]
    pub bench: String,
    /// Mean KL divergence of the noisy packet from the packet, nats; the paper asks for 0.05 to 0.1.
    #[arg(long, value_name = "KL", allow_negative_numbers = true)]
    pub target_kl: f64,
    /// Items of the pilot, spread evenly over the benchmark.
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub pilot_items: usize,
    /// Draws for each packet.
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub draws: u64,
    /// Entropy threshold of the reference pipeline.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub alpha: Option<f64>,
    /// Unit of alpha.
    #[arg(long, value_parser = alpha_unit, value_name = "normalized|nats|quantile")]
    pub alpha_unit: Option<AlphaUnit>,
    /// Entries of a packet; -1 is the whole vocabulary.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub k: Option<i64>,
    /// Most latent and explicit steps of a sample together.
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub max_steps: u32,
    /// Most latent steps of a sample.
    #[arg(long, value_name = "N")]
    pub max_latent_steps: Option<u32>,
    /// Seed of every draw.
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub seed: u64,
    /// Rows of the running batch.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096), value_name = "N")]
    pub batch_size: u32,
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
    /// Threads of one forward [default: physical cores].
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// Allow a model folder to run its own Python code.
    #[arg(long)]
    pub trust_remote_code: bool,
    /// One JSON object.
    #[arg(long)]
    pub json: bool,
}

/// The strength of noise over packets.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Strength {
    kl: f64,
    /// 10 % and 90 % quantiles of the KL over draws.
    spread: (f64, f64),
    js: f64,
}

/// A packet with the streams of its draws.
struct Sample<'a> {
    packet: &'a BeliefPacket,
    streams: Vec<Stream>,
}

fn samples(donors: &Donors, seed: u64, draws: u64) -> Vec<Sample<'_>> {
    donors
        .iter()
        .flat_map(|donor| {
            let key = sample_key(&donor.item_id, 0, 0);
            donor
                .packets
                .iter()
                .zip(0..)
                .map(move |(packet, step)| Sample {
                    packet,
                    streams: (0..draws)
                        .map(|draw| Stream {
                            seed: seed.wrapping_add(draw),
                            sample: key,
                            step,
                        })
                        .collect(),
                })
        })
        .collect()
}

/// The noise of one concentration on every packet, with the same draws whatever the concentration.
fn strength(samples: &[Sample<'_>], lambda: f64) -> Result<Strength, CliError> {
    let spec = NoiseSpec::Dirichlet { lambda };
    let mut kl = Vec::new();
    let mut js = Vec::new();
    for sample in samples {
        let (ids, probs) = (sample.packet.ids(), sample.packet.probs());
        for stream in &sample.streams {
            let mixed = noise::mix(&FilterSpec::NONE, &spec, ids, probs, stream)
                .map_err(|e| CliError::Failed(e.to_string()))?;
            kl.push(mixed.kl);
            js.push(mixed.js);
        }
    }
    kl.sort_by(f64::total_cmp);
    let of = |q| quantile(&kl, q).unwrap_or(f64::NAN);
    Ok(Strength {
        kl: mean(&kl).unwrap_or(f64::NAN),
        spread: (of(0.1), of(0.9)),
        js: mean(&js).unwrap_or(f64::NAN),
    })
}

/// The concentration whose mean KL is the target: more concentration, less noise.
fn bisect(samples: &[Sample<'_>], target: f64) -> Result<(f64, Strength), CliError> {
    let (mut low, mut high) = (LEAST.ln(), MOST.ln());
    let (most, least) = (strength(samples, LEAST)?.kl, strength(samples, MOST)?.kl);
    if !(least..=most).contains(&target) {
        return Err(CliError::Usage(format!(
            "--target-kl: {target} is out of reach of these packets: lambda {LEAST} gives {most:.4} nats, lambda {MOST:.0} gives {least:.1e}"
        )));
    }
    for _ in 0..HALVINGS {
        let middle = 0.5 * (low + high);
        if strength(samples, middle.exp())?.kl > target {
            low = middle;
        } else {
            high = middle;
        }
    }
    let lambda = (0.5 * (low + high)).exp();
    Ok((lambda, strength(samples, lambda)?))
}

pub(crate) fn command(
    args: &CalibrateArgs,
    host: &mut dyn Host,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    if !(args.target_kl.is_finite() && args.target_kl > 0.0) {
        return Err(CliError::Usage(format!(
            "--target-kl: {} is not a finite number above 0",
            args.target_kl
        )));
    }
    for (flag, value) in [
        ("--pilot-items", args.pilot_items as u64),
        ("--draws", args.draws),
        ("--threads", u64::from(args.threads.unwrap_or(1))),
    ] {
        if value == 0 {
            return Err(CliError::Usage(format!("{flag}: give at least 1")));
        }
    }
    let (packets, items) = packets(args, host, err)?;
    let samples = samples(&packets, args.seed, args.draws);
    let (lambda, found) = bisect(&samples, args.target_kl)?;
    let shipped = shipped(&samples)?;
    if args.json {
        let value = json!({
            "lambda": lambda,
            "target_kl": args.target_kl,
            "kl": found.kl,
            "kl_p10": found.spread.0,
            "kl_p90": found.spread.1,
            "js": found.js,
            "packets": samples.len(),
            "items": items,
            "draws": args.draws,
            "cells": shipped.iter().map(|(id, lambda, s)| json!({
                "id": id, "lambda": lambda, "kl": s.kl, "js": s.js,
            })).collect::<Vec<_>>(),
        });
        let text =
            serde_json::to_string_pretty(&value).map_err(|e| CliError::Failed(e.to_string()))?;
        writeln!(out, "{text}")?;
        return Ok(ExitStatus::Success);
    }
    writeln!(
        out,
        "lambda {lambda:.4} gives KL {:.4} nats (10 % of draws below {:.4}, 10 % above {:.4}), JS {:.4}",
        found.kl, found.spread.0, found.spread.1, found.js
    )?;
    writeln!(
        out,
        "measured on {} packets of {items} items, {} draws each; in a suites file: {{soft_mode: dirichlet, lambda: {lambda:.4}}}",
        samples.len(),
        args.draws
    )?;
    let mut rows = table(&["cell", "lambda", "KL", "JS"]);
    for (id, lambda, s) in shipped {
        rows.add_row([
            id,
            lambda.to_string(),
            format!("{:.4}", s.kl),
            format!("{:.4}", s.js),
        ]);
    }
    writeln!(out, "{rows}")?;
    Ok(ExitStatus::Success)
}

/// The noise of the shipped cells on the same packets.
fn shipped(samples: &[Sample<'_>]) -> Result<Vec<(String, f64, Strength)>, CliError> {
    let plan = Registry::builtin()?.expand(
        &["A1".to_owned(), "A1x".to_owned()],
        &[],
        &dlmom_runs::Setting::lockstep(1, true),
        &Overrides::default(),
    )?;
    plan.runs()
        .filter(|e| e.soft_mode == SoftMode::Dirichlet)
        .filter_map(|e| Some((e.id.clone(), e.lambda?)))
        .map(|(id, lambda)| Ok((id, lambda, strength(samples, lambda)?)))
        .collect()
}

/// The latent packets of the reference pipeline on the pilot's items, and how many items have any.
fn packets(
    args: &CalibrateArgs,
    host: &mut dyn Host,
    err: &mut dyn Write,
) -> Result<(Donors, usize), CliError> {
    let (experts, seating) = seat(&args.experts, args.model.as_ref(), args.topology.as_deref())?;
    let overrides = Overrides {
        alpha: args.alpha,
        alpha_unit: args.alpha_unit,
        k: args.k,
        max_steps: Some(args.max_steps),
        max_latent_steps: args.max_latent_steps,
        ..Overrides::default()
    };
    let plan = Registry::builtin()?.expand(
        &["A1".to_owned()],
        &[REF.to_owned()],
        &setting(&experts, &seating),
        &overrides,
    )?;
    let assumed = Placement {
        topology: seating.topology.clone(),
        pilot: Some(Pilot::assumed(seating.seats.len())),
    };
    let bench = BenchSpec::parse(&args.bench)?;
    let path: PathBuf = crate::prepare::data_path(&bench, &args.bench, host)?;
    let ItemSet { items, .. } = load(bench.schema(), &path)?;
    let (models, agents) = models_and_agents(&experts, &seating);
    let spec = EngineSpec {
        experts: models,
        agents,
        device: args.device.clone(),
        dtype: args.dtype.name().into(),
        slots: args.batch_size,
        threads: args.threads,
        trust_remote_code: args.trust_remote_code,
        deterministic: false,
        fast: false,
        attention: None,
        kernel: None,
        graphs: false,
    };
    let mut backend = mock::load(args.backend, &spec, host, err)?;
    for experiment in plan.runs() {
        check_config(&experiment.loop_config(&assumed)?, backend.info())?;
    }
    let bench = bench.bench();
    let around = Surroundings {
        seating: &seating,
        bench: &bench,
        items: &items,
        spare: &[],
        rows: args.batch_size,
        seed: args.seed,
    };
    let asked: Vec<&Item> = around.pilot_items(args.pilot_items);
    let lengths = longest(&mut *backend, &bench, &seating, &asked, &plan, &assumed)?;
    backend.reserve(args.batch_size, lengths.max_len)?;
    let wanted = Wanted {
        quantiles: args.alpha_unit == Some(AlphaUnit::Quantile),
        fit: false,
        donors: true,
        items: args.pilot_items,
    };
    let found = pilot::find(
        &wanted,
        None,
        &PathBuf::new(),
        &around,
        &plan,
        &mut *backend,
        host,
        err,
    )?;
    let items = found.donors.iter().count();
    Ok((found.donors, items))
}

#[cfg(test)]
mod tests {
    use dlmom_runtime::Donor;

    use super::*;

    #[test]
    fn the_concentration_found_has_the_strength_asked_for() {
        let packet = |probs: Vec<f32>| {
            let ids = (0..probs.len() as u32).collect();
            BeliefPacket::new(ids, probs, 1.0, 100).unwrap()
        };
        let donors = Donors::new(vec![Donor {
            item_id: "a".into(),
            packets: vec![packet(vec![0.6, 0.3, 0.1]), packet(vec![0.25; 4])],
        }]);
        let samples = samples(&donors, 3, 200);
        let (lambda, found) = bisect(&samples, 0.05).unwrap();
        assert!((found.kl - 0.05).abs() < 1e-3, "{found:?}");
        // For large lambda the expected KL of Dirichlet(lambda p) from p is (k - 1) / (2 lambda), here with k of 3 and 4.
        let theory = 2.5 / (2.0 * 0.05);
        assert!((lambda / theory - 1.0).abs() < 0.15, "{lambda}, {theory}");
        assert!(found.spread.0 < found.kl && found.kl < found.spread.1);
    }

    #[test]
    fn a_strength_out_of_reach_is_named() {
        let one = BeliefPacket::new(vec![7], vec![1.0], 1.0, 100).unwrap();
        let donors = Donors::new(vec![Donor {
            item_id: "a".into(),
            packets: vec![one],
        }]);
        let error = bisect(&samples(&donors, 0, 4), 0.05).unwrap_err();
        assert!(error.to_string().contains("out of reach"), "{error}");
    }
}
