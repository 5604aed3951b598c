//! The tidy and the wide table, once for CSV and Arrow.

use dlmom_eval::stats::{Interval, wilson};

use super::{Aggregate, AggregateCell};
use crate::drift::DriftKind;
use crate::row::Failure;
use crate::summary::{Mean, Summary};

/// One entry of a table; `None` is an empty field.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text.
    Text(Option<String>),
    /// A number.
    Float(Option<f64>),
    /// A count.
    Count(Option<u64>),
    /// Yes or no.
    Flag(Option<bool>),
}

/// One figure of one cell.
#[derive(Clone, Debug, PartialEq)]
pub struct TidyRow {
    /// The run's folder.
    pub run: String,
    /// Id of the cell.
    pub experiment: String,
    /// Its suite.
    pub suite: String,
    /// Name of the benchmark.
    pub bench: String,
    /// Name of the figure.
    pub metric: &'static str,
    /// The figure.
    pub value: f64,
    /// 95 % interval over items, where the figure has one.
    pub ci: Option<Interval>,
    /// Rows behind it.
    pub n: u64,
    /// Items behind it.
    pub n_items: u64,
    /// `deterministic`, or the seeds.
    pub seeds: String,
    /// Difference from the reference over shared items, for accuracies.
    pub delta_vs_ref: Option<f64>,
    /// Exact paired p-value, for accuracies.
    pub p_value: Option<f64>,
    /// The same adjusted by Holm within the suite.
    pub p_adj: Option<f64>,
    /// The cell whose rows these are.
    pub alias_of: Option<String>,
}

impl TidyRow {
    /// The columns in order.
    #[must_use]
    pub fn columns(&self) -> Vec<(&'static str, Value)> {
        let text = |t: &str| Value::Text(Some(t.to_owned()));
        vec![
            ("run", text(&self.run)),
            ("experiment", text(&self.experiment)),
            ("suite", text(&self.suite)),
            ("bench", text(&self.bench)),
            ("metric", text(self.metric)),
            ("value", Value::Float(Some(self.value))),
            ("ci_lo", Value::Float(self.ci.map(|c| c.lo))),
            ("ci_hi", Value::Float(self.ci.map(|c| c.hi))),
            ("n", Value::Count(Some(self.n))),
            ("n_items", Value::Count(Some(self.n_items))),
            ("seeds", text(&self.seeds)),
            ("delta_vs_ref", Value::Float(self.delta_vs_ref)),
            ("p_value", Value::Float(self.p_value)),
            ("p_adj", Value::Float(self.p_adj)),
            ("alias_of", Value::Text(self.alias_of.clone())),
        ]
    }
}

impl Aggregate {
    /// Long form: one row per cell and figure. Skipped cells have no figures.
    #[must_use]
    pub fn tidy(&self) -> Vec<TidyRow> {
        self.cells.iter().flat_map(tidy_rows).collect()
    }

    /// Wide form: one row per cell, skipped ones included; every row has the same columns.
    #[must_use]
    pub fn wide(&self) -> Vec<Vec<(&'static str, Value)>> {
        self.cells.iter().map(wide_row).collect()
    }
}

fn tidy_rows(cell: &AggregateCell) -> Vec<TidyRow> {
    let Some(s) = &cell.summary else {
        return Vec::new();
    };
    let row = |metric, value, ci| TidyRow {
        run: cell.run.clone(),
        experiment: cell.experiment.clone(),
        suite: cell.suite.clone(),
        bench: s.bench.clone(),
        metric,
        value,
        ci,
        n: s.n,
        n_items: s.n_items,
        seeds: s.seeds.label(),
        delta_vs_ref: None,
        p_value: None,
        p_adj: None,
        alias_of: cell.alias_of.clone(),
    };
    let mut rows = Vec::new();
    let versus = s.versus_ref.as_ref();
    for (metric, accuracy, score) in [
        ("accuracy", &s.accuracy, versus.map(|v| v.strict)),
        (
            "accuracy_flexible",
            &s.accuracy_flexible,
            versus.map(|v| v.flexible),
        ),
    ] {
        rows.push(TidyRow {
            delta_vs_ref: score.map(|p| p.delta),
            p_value: score.map(|p| p.p_value),
            p_adj: score.and_then(|p| p.p_adjusted),
            ..row(metric, accuracy.value, Some(accuracy.ci))
        });
        rows.extend(accuracy.seed_std.map(|std| {
            let name = if metric == "accuracy" {
                "accuracy_seed_std"
            } else {
                "accuracy_flexible_seed_std"
            };
            row(name, std, None)
        }));
    }
    let failed: u64 = s.failures.values().sum();
    let failure_rate = failed as f64 / s.n as f64;
    rows.push(row(
        "failure_rate",
        failure_rate,
        wilson(failure_rate, s.n_items),
    ));
    let means: [(&'static str, Mean); 7] = [
        ("explicit_tokens", s.explicit_tokens),
        ("latent_steps", s.latent_steps),
        ("total_steps", s.total_steps),
        ("switches", s.switches_mean),
        ("prompt_tokens", s.prompt_tokens),
        ("forward_tokens", s.forward_tokens),
        ("latency_s", s.latency_mean_s),
    ];
    rows.extend(means.map(|(metric, mean)| row(metric, mean.value, mean.ci)));
    let plain = [
        ("latent_coverage", s.latent_coverage),
        ("switches_p50", Some(s.switches.p50)),
        ("switches_p90", Some(s.switches.p90)),
        ("latency_p50_s", Some(s.latency_s.p50)),
        ("latency_p90_s", Some(s.latency_s.p90)),
        ("samples_per_s", s.samples_per_s),
        ("steps_per_s", s.steps_per_s),
        ("uplink_bytes_per_step", s.uplink.per_step),
        ("downlink_bytes_per_step", s.downlink.per_step),
        ("uplink_bytes_per_solved", s.uplink.per_solved),
        ("downlink_bytes_per_solved", s.downlink.per_solved),
        ("topk_mass", s.topk_mass),
        ("noise_kl", s.noise_kl),
        ("noise_js", s.noise_js),
        ("agreement", s.agreement),
        ("merge_rate", s.merge_rate),
        ("handoffs", Some(s.handoffs_mean)),
        (
            "handoff_bytes_per_solved",
            s.handoff.as_ref().and_then(|b| b.per_solved),
        ),
        ("entropy_mean", s.entropy.as_ref().map(|e| e.mean)),
        ("entropy_min", s.entropy.as_ref().map(|e| e.min)),
        ("entropy_max", s.entropy.as_ref().map(|e| e.max)),
        ("peak_device_bytes", s.peak_device_bytes.map(|b| b as f64)),
        ("peak_rss_bytes", s.peak_rss_bytes.map(|b| b as f64)),
    ];
    rows.extend(
        plain
            .into_iter()
            .filter_map(|(metric, v)| v.map(|v| row(metric, v, None))),
    );
    for drift in &s.drift {
        let [kl, cosine, events, changed] = drift_metrics(drift.kind);
        rows.extend(
            [
                (kl, drift.kl),
                (cosine, drift.cosine),
                (events, drift.events),
                (changed, drift.changed),
            ]
            .into_iter()
            .filter_map(|(metric, value)| {
                Some(TidyRow {
                    n: drift.samples,
                    ..row(metric, value?, None)
                })
            }),
        );
    }
    rows
}

/// Names of the figures of a kind of drift: KL, cosine, events, changed decisions.
fn drift_metrics(kind: DriftKind) -> [&'static str; 4] {
    match kind {
        DriftKind::Free => [
            "drift_free_kl",
            "drift_free_cosine",
            "drift_free_events",
            "drift_free_changed",
        ],
        DriftKind::Inputs => [
            "drift_inputs_kl",
            "drift_inputs_cosine",
            "drift_inputs_events",
            "drift_inputs_changed",
        ],
        DriftKind::OneStep => [
            "drift_one_step_kl",
            "drift_one_step_cosine",
            "drift_one_step_events",
            "drift_one_step_changed",
        ],
        DriftKind::Decisions => [
            "drift_decisions_kl",
            "drift_decisions_cosine",
            "drift_decisions_events",
            "drift_decisions_changed",
        ],
    }
}

fn wide_row(cell: &AggregateCell) -> Vec<(&'static str, Value)> {
    let s = cell.summary.as_ref();
    let text = |value: &str| Value::Text(Some(value.to_owned()));
    let float = |f: &dyn Fn(&Summary) -> Option<f64>| Value::Float(s.and_then(f));
    let count = |f: &dyn Fn(&Summary) -> Option<u64>| Value::Count(s.and_then(f));
    let versus = s.and_then(|s| s.versus_ref);
    let mut row = vec![
        ("run", text(&cell.run)),
        ("experiment", text(&cell.experiment)),
        ("suite", text(&cell.suite)),
        ("bench", Value::Text(s.map(|s| s.bench.clone()))),
        ("alias_of", Value::Text(cell.alias_of.clone())),
        ("skipped", Value::Text(cell.skipped.clone())),
        ("n", count(&|s| Some(s.n))),
        ("n_items", count(&|s| Some(s.n_items))),
        ("seeds", Value::Text(s.map(|s| s.seeds.label()))),
        ("accuracy", float(&|s| Some(s.accuracy.value))),
        ("accuracy_ci_lo", float(&|s| Some(s.accuracy.ci.lo))),
        ("accuracy_ci_hi", float(&|s| Some(s.accuracy.ci.hi))),
        ("accuracy_seed_std", float(&|s| s.accuracy.seed_std)),
        (
            "accuracy_flexible",
            float(&|s| Some(s.accuracy_flexible.value)),
        ),
        (
            "accuracy_flexible_ci_lo",
            float(&|s| Some(s.accuracy_flexible.ci.lo)),
        ),
        (
            "accuracy_flexible_ci_hi",
            float(&|s| Some(s.accuracy_flexible.ci.hi)),
        ),
        ("delta_vs_ref", Value::Float(versus.map(|v| v.strict.delta))),
        ("n01", Value::Count(versus.map(|v| v.strict.n01))),
        ("n10", Value::Count(versus.map(|v| v.strict.n10))),
        ("p_value", Value::Float(versus.map(|v| v.strict.p_value))),
        (
            "p_adj",
            Value::Float(versus.and_then(|v| v.strict.p_adjusted)),
        ),
        (
            "minimum_detectable",
            Value::Float(versus.and_then(|v| v.strict.minimum_detectable)),
        ),
        ("shared_items", Value::Count(versus.map(|v| v.shared_items))),
        ("inert", Value::Flag(s.map(|s| s.inert))),
        ("twin", Value::Text(s.and_then(|s| s.twin.clone()))),
        ("latent_coverage", float(&|s| s.latent_coverage)),
        ("explicit_tokens", float(&|s| Some(s.explicit_tokens.value))),
        ("latent_steps", float(&|s| Some(s.latent_steps.value))),
        ("total_steps", float(&|s| Some(s.total_steps.value))),
        (
            "total_steps_ci_lo",
            float(&|s| s.total_steps.ci.map(|c| c.lo)),
        ),
        (
            "total_steps_ci_hi",
            float(&|s| s.total_steps.ci.map(|c| c.hi)),
        ),
        ("switches_mean", float(&|s| Some(s.switches_mean.value))),
        ("switches_p50", float(&|s| Some(s.switches.p50))),
        ("switches_p90", float(&|s| Some(s.switches.p90))),
        ("switches_max", float(&|s| Some(s.switches.max))),
        ("handoffs_mean", float(&|s| Some(s.handoffs_mean))),
        ("prompt_tokens", float(&|s| Some(s.prompt_tokens.value))),
        ("forward_tokens", float(&|s| Some(s.forward_tokens.value))),
        ("uplink_bytes_per_step", float(&|s| s.uplink.per_step)),
        ("downlink_bytes_per_step", float(&|s| s.downlink.per_step)),
        ("uplink_bytes_per_solved", float(&|s| s.uplink.per_solved)),
        (
            "downlink_bytes_per_solved",
            float(&|s| s.downlink.per_solved),
        ),
        ("topk_mass", float(&|s| s.topk_mass)),
        ("noise_kl", float(&|s| s.noise_kl)),
        ("noise_js", float(&|s| s.noise_js)),
        ("agreement", float(&|s| s.agreement)),
        ("merge_rate", float(&|s| s.merge_rate)),
        (
            "entropy_mean",
            float(&|s| s.entropy.as_ref().map(|e| e.mean)),
        ),
        ("entropy_min", float(&|s| s.entropy.as_ref().map(|e| e.min))),
        ("entropy_max", float(&|s| s.entropy.as_ref().map(|e| e.max))),
        ("latency_mean_s", float(&|s| Some(s.latency_mean_s.value))),
        (
            "latency_mean_ci_lo_s",
            float(&|s| s.latency_mean_s.ci.map(|c| c.lo)),
        ),
        (
            "latency_mean_ci_hi_s",
            float(&|s| s.latency_mean_s.ci.map(|c| c.hi)),
        ),
        ("latency_p50_s", float(&|s| Some(s.latency_s.p50))),
        ("latency_p90_s", float(&|s| Some(s.latency_s.p90))),
        ("samples_per_s", float(&|s| s.samples_per_s)),
        ("steps_per_s", float(&|s| s.steps_per_s)),
        ("peak_device_bytes", count(&|s| s.peak_device_bytes)),
        ("peak_rss_bytes", count(&|s| s.peak_rss_bytes)),
    ];
    for (failure, name) in Failure::ALL.into_iter().zip([
        "failures_nan_inf",
        "failures_timeout",
        "failures_parse_failure",
        "failures_backend_error",
    ]) {
        row.push((name, count(&|s| s.failures.get(failure.label()).copied())));
    }
    for kind in DriftKind::ALL {
        let of = |f: &dyn Fn(&crate::DriftSummary) -> Option<f64>| {
            Value::Float(s.and_then(|s| s.drift.iter().find(|d| d.kind == kind).and_then(f)))
        };
        let [kl, cosine, events, changed] = drift_metrics(kind);
        if kind == DriftKind::Decisions {
            row.push((changed, of(&|d| d.changed)));
        } else {
            row.extend([
                (kl, of(&|d| d.kl)),
                (cosine, of(&|d| d.cosine)),
                (events, of(&|d| d.events)),
            ]);
        }
    }
    row.push(("config_hash", Value::Text(s.map(|s| s.config_hash.clone()))));
    row
}
