//! `compare`: cells against one another over the samples they share.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use dlmom_eval::stats::{Interval, holm};
use dlmom_eval::suggest::hint;
use dlmom_runs::fold::{CellRows, Slim};
use dlmom_runs::paired::{self, Paired, PairedScore};
use dlmom_runs::rundir::Kind;
use dlmom_runs::{Manifest, REF, read_manifest};
use serde_json::json;

use crate::report::{p_value, percent, table};
use crate::run::rows_of;
use crate::status::{CliError, ExitStatus};

/// Which answers count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Score {
    /// Answers in a format that was asked for.
    Strict,
    /// Any answer found.
    Flexible,
}

/// Arguments of `compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Run folder.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Another run folder: its cells are compared with those of the first.
    #[arg(value_name = "OTHER")]
    pub other: Option<PathBuf>,
    /// The cell that all are compared with [default: REF, with two runs the one of the same name].
    #[arg(long, value_name = "ID")]
    pub against: Option<String>,
    /// Only these cells.
    #[arg(long, num_args = 1.., value_name = "ID")]
    pub only: Vec<String>,
    /// Which answers count.
    #[arg(long, value_enum, default_value_t = Score::Strict)]
    pub score: Score,
    /// One JSON object.
    #[arg(long)]
    pub json: bool,
}

/// One comparison.
struct Line {
    cell: String,
    against: String,
    paired: Paired,
    /// Accuracies of both over the shared samples.
    accuracy: (f64, f64),
    bootstrap: Option<Interval>,
    adjusted: f64,
}

impl Line {
    fn score(&self, score: Score) -> &PairedScore {
        match score {
            Score::Strict => &self.paired.strict,
            Score::Flexible => &self.paired.flexible,
        }
    }
}

/// A folder whose rows are read as they are asked for.
struct Folder<'a> {
    path: &'a Path,
    manifest: Manifest,
}

impl<'a> Folder<'a> {
    fn open(path: &'a Path) -> Result<Self, CliError> {
        let manifest = read_manifest(path)?.ok_or_else(|| {
            CliError::Usage(format!(
                "{}: no run folder (it has no run.json)",
                path.display()
            ))
        })?;
        Ok(Self { path, manifest })
    }

    /// Cells with rows of their own.
    fn ids(&self) -> impl Iterator<Item = &str> {
        self.manifest
            .cells
            .iter()
            .filter(|c| c.kind == Kind::Run && self.has_rows(&c.id))
            .map(|c| c.id.as_str())
    }

    fn raw(&self, id: &str) -> PathBuf {
        self.path.join("raw").join(format!("{id}.jsonl"))
    }

    fn has_rows(&self, id: &str) -> bool {
        // A run that was killed before its first row leaves an empty file.
        std::fs::metadata(self.raw(id)).is_ok_and(|file| file.is_file() && file.len() > 0)
    }

    /// The cell whose rows `id` means.
    fn resolve(&self, id: &str, flag: &str) -> Result<String, CliError> {
        let known = || self.manifest.cells.iter().map(|c| c.id.as_str());
        let cell = self.manifest.cells.iter().find(|c| c.id == id);
        let target = cell.map(|c| c.alias_of.clone().unwrap_or_else(|| c.id.clone()));
        match target {
            Some(target) if self.has_rows(&target) => Ok(target),
            Some(_) => Err(CliError::Usage(format!(
                "{flag}: {id} has no rows in {}",
                self.path.display()
            ))),
            None => Err(CliError::Usage(format!(
                "{flag}: unknown id `{id}`{}; {} has {}",
                hint(id, known()),
                self.path.display(),
                known().collect::<Vec<_>>().join(", ")
            ))),
        }
    }

    fn rows(&self, id: &str) -> Result<Option<CellRows>, CliError> {
        rows_of(&self.raw(id))
    }
}

pub(crate) fn command(
    args: &CompareArgs,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    let base = Folder::open(&args.run)?;
    let other = args.other.as_deref().map(Folder::open).transpose()?;
    if let Some(other) = &other {
        let (a, b) = (&base.manifest, &other.manifest);
        if a.bench != b.bench {
            return Err(CliError::Usage(format!(
                "{} is of {}, {} of {}: they share no item",
                args.run.display(),
                a.bench,
                other.path.display(),
                b.bench
            )));
        }
        if a.data_sha256 != b.data_sha256 {
            writeln!(
                err,
                "note: the runs read different data files; items are matched by their ids"
            )?;
        }
    }
    let lines = lines(args, &base, other.as_ref())?;
    if lines.is_empty() {
        return Err(CliError::Usage(
            "nothing to compare: no other cell has rows of shared items".into(),
        ));
    }
    if args.json {
        let value = json!({
            "run": args.run.display().to_string(),
            "other": args.other.as_ref().map(|p| p.display().to_string()),
            "score": if args.score == Score::Strict { "strict" } else { "flexible" },
            "comparisons": lines.iter().map(|line| as_json(line, args.score)).collect::<Vec<_>>(),
        });
        let text =
            serde_json::to_string_pretty(&value).map_err(|e| CliError::Failed(e.to_string()))?;
        writeln!(out, "{text}")?;
    } else {
        print(&lines, args.score, out)?;
    }
    Ok(ExitStatus::Success)
}

fn lines(
    args: &CompareArgs,
    base: &Folder<'_>,
    other: Option<&Folder<'_>>,
) -> Result<Vec<Line>, CliError> {
    let ours = other.unwrap_or(base);
    let mut ids: Vec<String> = Vec::new();
    if args.only.is_empty() {
        ids.extend(ours.ids().map(str::to_owned));
    } else {
        for id in &args.only {
            let id = ours.resolve(id, "--only")?;
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
    }
    let fixed = match (args.against.as_deref(), other) {
        (None, Some(_)) => None,
        (against, _) => {
            let id = base.resolve(against.unwrap_or(REF), "--against")?;
            let rows = base.rows(&id)?;
            Some((id, rows))
        }
    };
    let right = |row: &Slim| match args.score {
        Score::Strict => row.correct,
        Score::Flexible => row.correct_flexible,
    };
    let mut lines = Vec::new();
    for id in ids {
        let namesake;
        let (against, theirs) = match &fixed {
            Some((against, _)) if other.is_none() && *against == id => continue,
            Some((against, rows)) => (against.clone(), rows),
            None if base.ids().any(|known| known == id) => {
                namesake = base.rows(&id)?;
                (id.clone(), &namesake)
            }
            None => continue,
        };
        let (Some(a), Some(b)) = (&ours.rows(&id)?, theirs) else {
            continue;
        };
        let Some(paired) = paired::compare(a, b) else {
            continue;
        };
        let differences = paired::differences(a, b, right);
        lines.push(Line {
            accuracy: accuracies(&paired::shares(a, b, right)),
            bootstrap: paired::bootstrap(&differences),
            cell: id,
            against,
            paired,
            adjusted: 1.0,
        });
    }
    let p: Vec<f64> = lines.iter().map(|l| l.score(args.score).p_value).collect();
    for (line, adjusted) in lines.iter_mut().zip(holm(&p)) {
        line.adjusted = adjusted;
    }
    Ok(lines)
}

/// Mean shares of right answers.
fn accuracies(shares: &[(f64, f64)]) -> (f64, f64) {
    let count = shares.len().max(1) as f64;
    let sum = |of: fn(&(f64, f64)) -> f64| shares.iter().map(of).sum::<f64>() / count;
    (sum(|(a, _)| *a), sum(|(_, b)| *b))
}

fn as_json(line: &Line, score: Score) -> serde_json::Value {
    let s = line.score(score);
    json!({
        "cell": line.cell,
        "against": line.against,
        "shared_items": line.paired.shared_items,
        "shared_rows": line.paired.shared_rows,
        "accuracy": line.accuracy.0,
        "accuracy_against": line.accuracy.1,
        "delta": s.delta,
        "bootstrap": line.bootstrap,
        "better": s.n01,
        "worse": s.n10,
        "p_value": s.p_value,
        "p_adjusted": line.adjusted,
        "minimum_detectable": s.minimum_detectable,
        "identical": line.paired.identical,
    })
}

fn print(lines: &[Line], score: Score, out: &mut dyn Write) -> Result<(), CliError> {
    let mut rows = table(&[
        "cell",
        "against",
        "items",
        "acc %",
        "against %",
        "d [95 % CI]",
        "better/worse",
        "p",
        "p Holm",
        "detectable",
        "note",
    ]);
    for line in lines {
        let s = line.score(score);
        let points = |x: f64| format!("{:+.1}", 100.0 * x);
        rows.add_row([
            line.cell.clone(),
            line.against.clone(),
            line.paired.shared_items.to_string(),
            percent(line.accuracy.0),
            percent(line.accuracy.1),
            line.bootstrap.map_or_else(
                || points(s.delta),
                |ci| format!("{} [{}, {}]", points(s.delta), points(ci.lo), points(ci.hi)),
            ),
            format!("{}/{}", s.n01, s.n10),
            p_value(s.p_value),
            p_value(line.adjusted),
            s.minimum_detectable
                .map_or_else(|| "-".into(), |d| format!("{:.1}", 100.0 * d)),
            if line.paired.identical {
                "every sample is the same".to_owned()
            } else {
                String::new()
            },
        ]);
    }
    writeln!(out, "{rows}")?;
    writeln!(
        out,
        "{} answers over shared items; d: difference in points, paired bootstrap over items ({} resamples);\nbetter/worse: items; p: exact McNemar (sign test over items with several seeds); p Holm: for all {} comparisons;\ndetectable: smallest difference these items would show with 80 % power at this discordance, points",
        match score {
            Score::Strict => "strict",
            Score::Flexible => "flexible",
        },
        paired::RESAMPLES,
        lines.len()
    )?;
    Ok(())
}
