//! Aggregation: equal to a naive fold, whatever the order, chunks and threads.
#![expect(clippy::expect_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{ENSEMBLE, context, experiment, plan, row, write_rows};
use dlmom_eval::stats::{mcnemar_exact, wilson};
use dlmom_runs::fold::{FoldError, read_cell, read_cell_in_chunks};
use dlmom_runs::rundir::MANIFEST_FORMAT;
use dlmom_runs::summary::hist_quantile;
use dlmom_runs::{
    Aggregate, AggregateError, Manifest, ManifestCell, RawRow, RunDir, aggregate, raw_batch,
    summarize,
};
use dlmom_runtime::{entropy_bin, outcome::ENTROPY_BINS};
use proptest::prelude::*;
use serde_json::{Value, json};

/// 12 items: REF right on even ones, A1.1's alias, A1.2 with two seeds, right unless divisible by three.
fn example(folder: &Path) {
    let plan = plan(&["A1", "A3"], &["A1.1", "A1.2", "A3.1", "A3.3"], &ENSEMBLE);
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        version: "0.1.0".into(),
        bench: "tinygsm".into(),
        data_sha256: "00".into(),
        items: 12,
        seeds: vec![0, 1],
        samples: 1,
        batch_size: 8,
        models: Value::Null,
        shared_model: false,
        experts: 2,
        ln_vocab: Some(491f64.ln()),
        cells: ManifestCell::of_plan(&plan, &context(), None).expect("finite knobs"),
        context: context(),
        environment: json!({}),
        invocations: Vec::new(),
        pilot: None,
        notes: Value::Null,
    };
    let dir = RunDir::open(folder, &plan, manifest, false).expect("a fresh folder");
    let reference = experiment("REF");
    let rows: Vec<RawRow> = (0..12)
        .map(|i| row(&reference, i, 0, (i % 2 == 0).then_some(i), 0))
        .collect();
    write_rows(&dir.raw_path("REF"), &rows);
    let noisy = experiment("A1.2");
    let rows: Vec<RawRow> = (0..24)
        .map(|i| {
            row(
                &noisy,
                i / 2,
                i % 2,
                Some(if i / 2 % 3 == 0 { 99 } else { i / 2 }),
                3,
            )
        })
        .collect();
    write_rows(&dir.raw_path("A1.2"), &rows);
}

fn shown(folder: &Path, text: &str) -> String {
    text.replace(&folder.display().to_string(), "RUN")
}

#[test]
fn tables_hold_runs_aliases_and_skipped_cells() {
    let folder = tempfile::tempdir().unwrap();
    example(folder.path());
    let all = aggregate(&[folder.path()]).unwrap();
    assert!(all.warnings.is_empty(), "{:?}", all.warnings);
    insta::assert_snapshot!("tidy_csv", shown(folder.path(), &all.tidy_csv()));
    insta::assert_snapshot!("wide_csv", shown(folder.path(), &all.wide_csv()));
    let latex = all.latex().replace(
        &folder.path().display().to_string().replace('_', "\\_"),
        "RUN",
    );
    insta::assert_snapshot!("latex", latex);
}

#[test]
fn figures_are_those_of_a_hand_count() {
    let folder = tempfile::tempdir().unwrap();
    example(folder.path());
    let all = aggregate(&[folder.path()]).unwrap();
    let of = |id: &str| {
        let cell = all.cells.iter().find(|c| c.experiment == id).unwrap();
        cell.summary.clone().unwrap()
    };
    let reference = of("REF");
    assert_eq!(
        (reference.n, reference.n_items, reference.accuracy.value),
        (12, 12, 0.5)
    );
    assert_eq!(reference.accuracy.ci, wilson(0.5, 12).unwrap());
    assert_eq!(reference.failures["parse_failure"], 6);
    assert_eq!(reference.seeds.label(), "deterministic");
    assert_eq!(
        (reference.latent_coverage, reference.versus_ref),
        (Some(0.0), None)
    );
    assert!(!reference.inert);
    let noisy = of("A1.2");
    assert_eq!(
        (noisy.n, noisy.n_items, noisy.seeds.label()),
        (24, 12, "0 1".to_owned())
    );
    assert!((noisy.accuracy.value - 8.0 / 12.0).abs() < 1e-12);
    // The interval is over items: two seeds of one item are one trial.
    assert_eq!(noisy.accuracy.ci, wilson(noisy.accuracy.value, 12).unwrap());
    assert_eq!(noisy.accuracy.seed_std, Some(0.0));
    assert_eq!(noisy.latent_coverage, Some(3.0 / 8.0));
    assert_eq!(noisy.latent_segments, BTreeMap::from([(3, 24)]));
    assert_eq!((noisy.switches.p50, noisy.switches.max), (1.0, 1.0));
    assert_eq!(
        (noisy.uplink.per_step, noisy.uplink.per_solved),
        (Some(50.0), Some(600.0))
    );
    // Better on 1, 5, 7, 11; worse on 0, 6.
    let versus = noisy.versus_ref.unwrap();
    assert_eq!((versus.shared_items, versus.shared_rows), (12, 24));
    assert_eq!((versus.strict.n01, versus.strict.n10), (4, 2));
    assert!((versus.strict.delta - 2.0 / 12.0).abs() < 1e-12);
    assert_eq!(versus.strict.p_value, mcnemar_exact(4, 2));
    assert_eq!(versus.strict.p_adjusted, Some(mcnemar_exact(4, 2)));
    assert!(
        (versus.strict.minimum_detectable.unwrap() - 2.8 * (0.5f64 / 12.0).sqrt()).abs() < 1e-12
    );
    assert!(!noisy.inert);
    // Two half-second samples start at 1000 s (seed 0) and two at 1001 s: one second of work in all.
    assert_eq!(noisy.samples_per_s, Some(24.0));
    let alpha = noisy.alpha_for_coverage[1];
    assert!(
        alpha.normalized.is_some_and(|a| (0.01..0.06).contains(&a)),
        "{alpha:?}"
    );
    assert_eq!(alpha.nats, alpha.normalized.map(|a| a * 491f64.ln()));
}

#[test]
fn a_variant_that_changed_nothing_is_inert() {
    let folder = tempfile::tempdir().unwrap();
    for id in ["REF", "A1.2"] {
        let cell = experiment(id);
        let rows: Vec<RawRow> = (0..4).map(|i| row(&cell, i, 0, Some(i), 0)).collect();
        write_rows(&folder.path().join(format!("{id}.jsonl")), &rows);
    }
    let inert = |all: &Aggregate| all.cells[1].summary.as_ref().unwrap().inert;
    assert!(inert(&aggregate(&[folder.path()]).unwrap()));
    let path = folder.path().join("A1.2.jsonl");
    let text =
        std::fs::read_to_string(&path)
            .unwrap()
            .replacen("\"switches\":0", "\"switches\":1", 1);
    std::fs::write(&path, text).unwrap();
    assert!(!inert(&aggregate(&[folder.path()]).unwrap()));
}

#[test]
fn arrow_tables_hold_the_same_figures() {
    use arrow_array::{Array, Float64Array, ListArray, StringArray};
    let folder = tempfile::tempdir().unwrap();
    example(folder.path());
    let all = aggregate(&[folder.path()]).unwrap();
    let cells = all.cells_batch().unwrap();
    assert_eq!(cells.num_rows(), all.cells.len());
    let accuracy = cells.column_by_name("accuracy").unwrap();
    let accuracy = accuracy.as_any().downcast_ref::<Float64Array>().unwrap();
    assert_eq!(accuracy.value(0), 0.5);
    assert!(accuracy.is_null(3), "A3.1 was skipped");
    let tidy = all.tidy_batch().unwrap();
    assert_eq!(tidy.num_rows(), all.tidy().len());
    let (raw, warnings) = raw_batch(&[folder.path()], true).unwrap();
    assert!(warnings.is_empty());
    assert_eq!(raw.num_rows(), 36);
    let text = raw.column_by_name("text").unwrap();
    assert!(
        text.as_any()
            .downcast_ref::<StringArray>()
            .unwrap()
            .value(0)
            .contains("####")
    );
    let segments = raw.column_by_name("latent_segments").unwrap();
    assert_eq!(
        segments
            .as_any()
            .downcast_ref::<ListArray>()
            .unwrap()
            .value_length(0),
        1
    );
    let (raw, _) = raw_batch(&[folder.path()], false).unwrap();
    assert!(raw.column_by_name("text").is_none());
}

#[test]
fn faults_name_file_line_column_and_field() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("A1.2.jsonl");
    let cell = experiment("A1.2");
    let good = serde_json::to_string(&row(&cell, 1, 0, Some(1), 0)).unwrap();
    let said = |text: String| {
        std::fs::write(&path, text).unwrap();
        let error = aggregate(&[&path]).unwrap_err();
        // Independent of chunks.
        let again = read_cell_in_chunks(&path, 7).unwrap_err();
        assert_eq!(error.to_string(), again.to_string());
        let batch = raw_batch(&[&path], false);
        assert!(batch.is_err() || matches!(again, FoldError::Mixed { .. }));
        shown(folder.path(), &error.to_string())
    };
    let other = row(&experiment("A1.3"), 1, 0, Some(1), 0);
    let cases = [
        format!("{good}\n{good}\nnot json\n{good}\n"),
        format!("{good}\n\n{good}\n"),
        format!("{}\n", good.replace("\"seed\":0", "\"seed\":\"0\"")),
        format!("{}\n", good.replace("\"seed\":0,", "")),
        format!("{good}\n{}\n", good.replace("\"max\":0.4", "\"max\":null")),
        format!(
            "{}\n",
            good.replace("\"failure\":null", "\"failure\":\"tired\"")
        ),
        format!("{good}\n{}\n", serde_json::to_string(&other).unwrap()),
        format!(
            "{good}\n{}\n",
            good.replace("\"suite\":\"A1\"", "\"suite\":\"B\"")
        ),
        format!("{good}\n{}", good.replace("\"seed\":0", "\"seed\":-1")),
    ];
    insta::assert_snapshot!("fold_errors", cases.map(said).join("\n"));
}

#[test]
fn a_torn_last_line_is_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("A1.2.jsonl");
    let cell = experiment("A1.2");
    let good = serde_json::to_string(&row(&cell, 1, 0, Some(1), 0)).unwrap();
    let next = serde_json::to_string(&row(&cell, 2, 0, Some(1), 0)).unwrap();
    for cut in [1, 10, 200, next.len() - 1] {
        std::fs::write(&path, format!("{good}\n{}", &next[..cut])).unwrap();
        let all = aggregate(&[&path]).unwrap();
        assert_eq!(all.cells[0].summary.as_ref().unwrap().n, 1);
        let expected = format!("the last line is torn ({cut} bytes)");
        assert!(all.warnings[0].contains(&expected), "{:?}", all.warnings);
        assert_eq!(raw_batch(&[&path], false).unwrap().1, all.warnings);
    }
    std::fs::write(&path, format!("{good}\n{next}")).unwrap();
    let all = aggregate(&[&path]).unwrap();
    assert_eq!(
        (all.cells[0].summary.as_ref().unwrap().n, all.warnings.len()),
        (2, 0)
    );
}

#[test]
fn missing_and_empty_inputs_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(
        aggregate::<&Path>(&[]),
        Err(AggregateError::NoPaths)
    ));
    let missing = folder.path().join("nope");
    assert!(matches!(
        aggregate(&[&missing]),
        Err(AggregateError::NotFound { .. })
    ));
    assert!(matches!(
        aggregate(&[folder.path()]),
        Err(AggregateError::NoRaw { .. })
    ));
    std::fs::create_dir(folder.path().join("raw")).unwrap();
    assert!(matches!(
        aggregate(&[folder.path()]),
        Err(AggregateError::NoRaw { .. })
    ));
    std::fs::write(folder.path().join("raw/REF.jsonl"), "").unwrap();
    assert!(matches!(
        aggregate(&[folder.path()]),
        Err(AggregateError::NoRaw { .. })
    ));
    let cell = experiment("A1.2");
    let rows = [row(&cell, 1, 0, Some(1), 0)];
    write_rows(&folder.path().join("raw/A1.2.jsonl"), &rows);
    assert_eq!(aggregate(&[folder.path()]).unwrap().warnings.len(), 1);
    write_rows(&folder.path().join("raw/copy.jsonl"), &rows);
    assert!(matches!(
        aggregate(&[folder.path()]),
        Err(AggregateError::TwoFiles { .. })
    ));
}

#[test]
fn histogram_quantiles_are_within_a_bin_of_the_values() {
    let values: Vec<f64> = (1..=1000).map(|i| f64::from(i) / 1000.0).collect();
    let mut hist = vec![0u64; ENTROPY_BINS];
    for value in &values {
        hist[entropy_bin(*value)] += 1;
    }
    for q in [0.1, 0.5, 0.9] {
        let read = hist_quantile(&hist, q).unwrap();
        assert!((read / q).ln().abs() < 10f64.powf(0.25).ln(), "{q}: {read}");
    }
    assert_eq!(hist_quantile(&[0; ENTROPY_BINS], 0.5), None);
    assert_eq!(hist_quantile(&[3, 0, 0], 0.5), Some(1e-5));
    let mut ones = vec![0; ENTROPY_BINS];
    ones[ENTROPY_BINS - 1] = 2;
    assert_eq!(hist_quantile(&ones, 0.5), Some(1.0));
}

/// What a script would compute, one row after the other: accuracy by item, coverage, failures, and the split against REF.
fn naive(rows: &[RawRow], reference: &[RawRow]) -> (f64, f64, u64, u64, u64) {
    let mut last: BTreeMap<_, &RawRow> = BTreeMap::new();
    for row in rows {
        last.insert((row.item_id.clone(), row.seed, row.sample), row);
    }
    let refs: BTreeMap<_, bool> = reference
        .iter()
        .map(|r| (r.item_id.clone(), r.correct))
        .collect();
    let mut items: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let (mut latent, mut steps, mut failed) = (0u64, 0u64, 0u64);
    for row in last.values() {
        items
            .entry(row.item_id.clone())
            .or_default()
            .push(f64::from(u8::from(row.correct)));
        latent += u64::from(row.latent_steps);
        steps += u64::from(row.total_steps);
        failed += u64::from(row.failure.is_some());
    }
    let means: BTreeMap<&String, f64> = items
        .iter()
        .map(|(k, v)| (k, v.iter().sum::<f64>() / v.len() as f64))
        .collect();
    let split = |better: bool| {
        means
            .iter()
            .filter_map(|(k, m)| Some((*m, f64::from(u8::from(*refs.get(*k)?)))))
            .filter(|(m, r)| if better { m > r } else { m < r })
            .count() as u64
    };
    let accuracy = means.values().sum::<f64>() / means.len() as f64;
    (
        accuracy,
        latent as f64 / steps as f64,
        failed,
        split(true),
        split(false),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_fold_equals_a_naive_one_in_any_order_chunk_and_thread_count(
        samples in prop::collection::vec((0u64..8, 0u64..3, any::<bool>(), 0u32..4), 1..40),
        answered in prop::collection::vec(any::<bool>(), 8),
        seed in any::<u64>(),
        chunk in 1u64..5000,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let cell = experiment("A1.2");
        let rows: Vec<RawRow> = samples
            .iter()
            .map(|(i, seed, right, latent)| row(&cell, *i, *seed, right.then_some(*i), *latent))
            .collect();
        let reference: Vec<RawRow> = answered
            .iter()
            .enumerate()
            .map(|(i, right)| row(&experiment("REF"), i as u64, 0, right.then_some(i as u64), 0))
            .collect();
        let path = folder.path().join("A1.2.jsonl");
        write_rows(&path, &rows);
        write_rows(&folder.path().join("REF.jsonl"), &reference);
        let all = aggregate(&[folder.path()]).unwrap();
        let summary = all.cells[1].summary.clone().unwrap();
        let (accuracy, coverage, failed, n01, n10) = naive(&rows, &reference);
        prop_assert!((summary.accuracy.value - accuracy).abs() < 1e-12);
        prop_assert!((summary.latent_coverage.unwrap() - coverage).abs() < 1e-12);
        prop_assert_eq!(summary.failures.values().sum::<u64>(), failed);
        let versus = summary.versus_ref.unwrap();
        prop_assert_eq!((versus.strict.n01, versus.strict.n10), (n01, n10));

        let chunked = read_cell_in_chunks(&path, chunk).unwrap();
        prop_assert_eq!(&chunked, &read_cell(&path).unwrap());
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let here = pool.install(|| aggregate(&[folder.path()])).unwrap();
            prop_assert_eq!(here.tidy_csv(), all.tidy_csv());
        }

        // Another order of distinct samples is the same run.
        let mut unique: BTreeMap<_, RawRow> = BTreeMap::new();
        for row in rows {
            unique.insert((row.item_id.clone(), row.seed), row);
        }
        let mut shuffled: Vec<RawRow> = unique.into_values().collect();
        let mut state = seed | 1;
        for i in (1..shuffled.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            shuffled.swap(i, (state >> 33) as usize % (i + 1));
        }
        write_rows(&path, &shuffled);
        let moved = read_cell(&path).unwrap();
        prop_assert_eq!(&moved.rows, &chunked.rows);
        prop_assert_eq!(summarize(&moved, None, None), summarize(&chunked, None, None));
    }
}
