//! Progress on standard error.

use std::io::Write;
use std::time::{Duration, Instant};

use serde::Serialize;

/// A cell about to run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CellStart {
    /// Its id.
    pub id: String,
    /// Its place among the cells that run, from 1.
    pub index: usize,
    /// Cells that run.
    pub cells: usize,
    /// Samples it has in all.
    pub total: u64,
    /// Samples done before, on resume.
    pub done: u64,
}

/// The state of the running cell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CellProgress {
    /// Its id.
    pub id: String,
    /// Samples done, those before included.
    pub done: u64,
    /// Samples it has in all.
    pub total: u64,
    /// Samples done by this invocation; what follows counts these alone.
    pub session: u64,
    /// Correct ones.
    pub correct: u64,
    /// Samples with a failure label.
    pub failures: u64,
    /// Latent steps over all steps so far.
    pub coverage: f64,
    /// Samples in slots.
    pub active: u32,
    /// Samples a second in this cell.
    pub rate: f64,
    /// Seconds left in this cell at that rate.
    pub eta_s: Option<f64>,
}

/// Something that shows progress. Never fails: what cannot be shown is dropped.
pub trait Display {
    /// A cell begins.
    fn start(&mut self, cell: &CellStart);
    /// A cell moves on; called at most ten times a second.
    fn update(&mut self, progress: &CellProgress);
    /// A cell ended.
    fn finish(&mut self, progress: &CellProgress);
    /// A line to keep.
    fn line(&mut self, text: &str);
    /// Nothing more will come.
    fn stop(&mut self) {}
}

/// Shows nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Display for Silent {
    fn start(&mut self, _: &CellStart) {}
    fn update(&mut self, _: &CellProgress) {}
    fn finish(&mut self, _: &CellProgress) {}
    fn line(&mut self, _: &str) {}
}

/// Plain lines: one every few seconds over all cells that run, and two per cell.
pub struct Plain<W: Write> {
    out: W,
    every: Duration,
    last: Instant,
    /// Cells that have begun and not ended, with when and how far.
    running: Vec<(String, Instant, Option<CellProgress>)>,
}

impl<W: Write> Plain<W> {
    /// Writes to `out`, at most once in `every` between the beginnings and ends of cells.
    pub fn new(out: W, every: Duration) -> Self {
        Self {
            out,
            every,
            last: Instant::now(),
            running: Vec::new(),
        }
    }

    fn print(&mut self, text: &str) {
        let _ = writeln!(self.out, "{text}");
        let _ = self.out.flush();
    }
}

fn describe(p: &CellProgress) -> String {
    let accuracy = if p.session == 0 {
        0.0
    } else {
        100.0 * p.correct as f64 / p.session as f64
    };
    let eta = p
        .eta_s
        .map_or_else(String::new, |eta| format!(", {eta:.0} s left"));
    let failures = if p.failures > 0 {
        format!(", {} failures", p.failures)
    } else {
        String::new()
    };
    format!(
        "{}: {}/{} samples, accuracy {accuracy:.1} %, coverage {:.1} %, {:.1} samples/s{eta}{failures}",
        p.id,
        p.done,
        p.total,
        100.0 * p.coverage,
        p.rate
    )
}

/// Cells that share a batch, together.
fn describe_all(cells: &[&CellProgress]) -> String {
    let sum = |of: fn(&CellProgress) -> u64| cells.iter().map(|p| of(p)).sum::<u64>();
    let (done, total, failures) = (sum(|p| p.done), sum(|p| p.total), sum(|p| p.failures));
    let rate: f64 = cells.iter().map(|p| p.rate).sum();
    let eta = if rate > 0.0 {
        format!(", {:.0} s left", (total - done) as f64 / rate)
    } else {
        String::new()
    };
    let failures = if failures > 0 {
        format!(", {failures} failures")
    } else {
        String::new()
    };
    format!(
        "{} cells: {done}/{total} samples, {rate:.1} samples/s{eta}{failures}",
        cells.len()
    )
}

impl<W: Write> Display for Plain<W> {
    fn start(&mut self, cell: &CellStart) {
        let now = Instant::now();
        if self.running.is_empty() {
            self.last = now;
        }
        self.running.push((cell.id.clone(), now, None));
        let before = if cell.done > 0 {
            format!(", {} done before", cell.done)
        } else {
            String::new()
        };
        self.print(&format!(
            "[{}/{}] {}: {} samples{before}",
            cell.index, cell.cells, cell.id, cell.total
        ));
    }

    fn update(&mut self, progress: &CellProgress) {
        if let Some((.., shown)) = self.running.iter_mut().find(|(id, ..)| *id == progress.id) {
            *shown = Some(progress.clone());
        }
        if self.last.elapsed() >= self.every {
            self.last = Instant::now();
            let shown: Vec<&CellProgress> = self
                .running
                .iter()
                .filter_map(|(.., p)| p.as_ref())
                .collect();
            let line = match shown[..] {
                [one] => describe(one),
                _ => describe_all(&shown),
            };
            self.print(&format!("  {line}"));
        }
    }

    fn finish(&mut self, progress: &CellProgress) {
        let settled = CellProgress {
            eta_s: None,
            ..progress.clone()
        };
        let place = self.running.iter().position(|(id, ..)| *id == progress.id);
        let seconds = place.map_or(0.0, |place| {
            self.running.swap_remove(place).1.elapsed().as_secs_f64()
        });
        self.print(&format!("  {} ({seconds:.1} s)", describe(&settled)));
    }

    fn line(&mut self, text: &str) {
        self.print(text);
    }
}

/// One JSON object a line, for log collectors.
pub struct Log<W: Write>(pub W);

impl<W: Write> Log<W> {
    fn print<T: Serialize>(&mut self, event: &str, value: &T) {
        if let Ok(value) = serde_json::to_value(value) {
            let _ = writeln!(
                self.0,
                "{}",
                serde_json::json!({ "event": event, "data": value })
            );
            let _ = self.0.flush();
        }
    }
}

impl<W: Write> Display for Log<W> {
    fn start(&mut self, cell: &CellStart) {
        self.print("cell_started", cell);
    }
    fn update(&mut self, progress: &CellProgress) {
        self.print("progress", progress);
    }
    fn finish(&mut self, progress: &CellProgress) {
        self.print("cell_finished", progress);
    }
    fn line(&mut self, text: &str) {
        self.print("message", &text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(id: &str, done: u64) -> CellProgress {
        CellProgress {
            id: id.into(),
            done,
            total: 10,
            session: done,
            correct: done / 2,
            failures: u64::from(id == "b"),
            coverage: 0.25,
            active: 2,
            rate: 2.0,
            eta_s: Some(3.0),
        }
    }

    fn start(id: &str, index: usize) -> CellStart {
        CellStart {
            id: id.into(),
            index,
            cells: 2,
            total: 10,
            done: 0,
        }
    }

    #[test]
    fn cells_that_run_together_share_a_line() {
        let mut out = Vec::new();
        let mut plain = Plain::new(&mut out, Duration::ZERO);
        plain.start(&start("a", 1));
        plain.update(&progress("a", 4));
        plain.start(&start("b", 2));
        plain.update(&progress("b", 2));
        plain.finish(&progress("a", 10));
        plain.update(&progress("b", 5));
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text
            .lines()
            .map(|line| line.split(" (").next().unwrap_or(line))
            .collect();
        assert_eq!(
            lines,
            [
                "[1/2] a: 10 samples",
                "  a: 4/10 samples, accuracy 50.0 %, coverage 25.0 %, 2.0 samples/s, 3 s left",
                "[2/2] b: 10 samples",
                "  2 cells: 6/20 samples, 4.0 samples/s, 4 s left, 1 failures",
                "  a: 10/10 samples, accuracy 50.0 %, coverage 25.0 %, 2.0 samples/s",
                "  b: 5/10 samples, accuracy 40.0 %, coverage 25.0 %, 2.0 samples/s, 3 s left, 1 failures",
            ]
        );
    }

    #[test]
    fn lines_wait_for_their_time() {
        let mut out = Vec::new();
        let mut plain = Plain::new(&mut out, Duration::from_secs(3600));
        plain.start(&start("a", 1));
        plain.update(&progress("a", 4));
        assert_eq!(String::from_utf8(out).unwrap().lines().count(), 1);
    }
}
