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

/// Plain lines: one every few seconds and one per cell.
pub struct Plain<W: Write> {
    out: W,
    every: Duration,
    last: Instant,
    started: Instant,
}

impl<W: Write> Plain<W> {
    /// Writes to `out`, at most once in `every` between a cell's beginning and its end.
    pub fn new(out: W, every: Duration) -> Self {
        let now = Instant::now();
        Self {
            out,
            every,
            last: now,
            started: now,
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

impl<W: Write> Display for Plain<W> {
    fn start(&mut self, cell: &CellStart) {
        self.started = Instant::now();
        self.last = self.started;
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
        if self.last.elapsed() >= self.every {
            self.last = Instant::now();
            self.print(&format!("  {}", describe(progress)));
        }
    }

    fn finish(&mut self, progress: &CellProgress) {
        let settled = CellProgress {
            eta_s: None,
            ..progress.clone()
        };
        self.print(&format!(
            "  {} ({:.1} s)",
            describe(&settled),
            self.started.elapsed().as_secs_f64()
        ));
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
