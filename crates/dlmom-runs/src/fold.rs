//! Raw files into memory: in parallel, in bounded chunks, without the texts.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rayon::prelude::*;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::row::{EntropySpread, Failure};

/// Bytes that one task reads at a time.
pub const CHUNK_BYTES: u64 = 1 << 20;
/// Chunks of every thread that are parsed before their rows are gathered.
const AHEAD: usize = 2;

/// One way a raw file can be wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FoldError {
    /// The file cannot be read.
    #[error("{file}: cannot read: {source}", file = file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A whole line is not a row.
    #[error("{file}:{line}:{column}: {at}{message}", file = file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The column, from 1.
        column: usize,
        /// "field `x`: ", or empty.
        at: String,
        /// The parser's words.
        message: String,
    },
    /// Rows of two experiments, or of two configurations of one.
    #[error("{file}: mixes rows of {field} {first} and {second}", file = file.display())]
    Mixed {
        /// The file.
        file: PathBuf,
        /// What differs.
        field: &'static str,
        /// One value.
        first: String,
        /// The other.
        second: String,
    },
    /// No rows.
    #[error("{file}: holds no rows", file = file.display())]
    Empty {
        /// The file.
        file: PathBuf,
    },
}

/// The part of a raw row that summaries need.
#[derive(Clone, Debug, PartialEq)]
pub struct Slim {
    /// The item.
    pub item: Box<str>,
    /// The seed.
    pub seed: u64,
    /// The sample.
    pub sample: u32,
    /// Strictly right.
    pub correct: bool,
    /// Right by any rule.
    pub correct_flexible: bool,
    /// Failure label.
    pub failure: Option<Failure>,
    /// Digest of text, latent steps, switches and the bits of the mean entropy.
    pub output: u64,
    /// Printed tokens.
    pub explicit_tokens: u32,
    /// Tokens of injected texts.
    pub injected_tokens: u32,
    /// Latent steps.
    pub latent_steps: u32,
    /// Lengths of the latent segments.
    pub latent_segments: Box<[u32]>,
    /// Changes of mode.
    pub switches: u32,
    /// Handoffs.
    pub handoffs: u32,
    /// Bytes handed over.
    pub handoff_bytes: u64,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Positions forwarded.
    pub forward_tokens: u64,
    /// Bytes to consensus.
    pub uplink_bytes: u64,
    /// Bytes from consensus.
    pub downlink_bytes: u64,
    /// Normalised entropy.
    pub entropy: Option<EntropySpread>,
    /// Counts of normalised entropies.
    pub entropy_hist: Box<[u32]>,
    /// Mean top-k mass.
    pub topk_mass: Option<f64>,
    /// Mean noise KL in nats.
    pub noise_kl: Option<f64>,
    /// Mean Jensen-Shannon divergence of the same.
    pub noise_js: Option<f64>,
    /// Share of steps in which experts agree.
    pub agreement: Option<f64>,
    /// Share of steps in which experts were merged.
    pub merge_rate: Option<f64>,
    /// Seconds.
    pub latency_s: f64,
    /// Seconds since the Unix epoch.
    pub started_at: f64,
    /// Highest device allocation.
    pub peak_device_bytes: Option<u64>,
    /// Highest resident set.
    pub peak_rss_bytes: Option<u64>,
    /// Slots.
    pub batch_size: u32,
}

impl Slim {
    /// All steps.
    #[must_use]
    pub fn total_steps(&self) -> u32 {
        self.explicit_tokens + self.latent_steps
    }

    fn key(&self) -> (&str, u64, u32) {
        (&self.item, self.seed, self.sample)
    }
}

/// The rows of one raw file, sorted by (item, seed, sample); of several rows of one sample the last in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct CellRows {
    /// Id of the cell.
    pub experiment: String,
    /// Its suite.
    pub suite: String,
    /// Name of the benchmark.
    pub bench: String,
    /// Digest of the configuration.
    pub config_hash: String,
    /// No draw could change an output.
    pub deterministic: bool,
    /// The rows.
    pub rows: Vec<Slim>,
    /// What was odd about the file but no error, one line each.
    pub warnings: Vec<String>,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    experiment: Cow<'a, str>,
    #[serde(borrow)]
    suite: Cow<'a, str>,
    #[serde(borrow)]
    bench: Cow<'a, str>,
    #[serde(borrow)]
    config_hash: Cow<'a, str>,
    #[serde(borrow)]
    item_id: Cow<'a, str>,
    seed: u64,
    sample: u32,
    deterministic: bool,
    correct: bool,
    correct_flexible: bool,
    #[serde(borrow)]
    text: Cow<'a, str>,
    failure: Option<Failure>,
    explicit_tokens: u32,
    // Absent from rows of version 1.
    #[serde(default)]
    injected_tokens: u32,
    latent_steps: u32,
    latent_segments: Box<[u32]>,
    switches: u32,
    handoffs: u32,
    #[serde(default)]
    handoff_bytes: u64,
    prompt_tokens: u64,
    forward_tokens: u64,
    uplink_bytes: u64,
    downlink_bytes: u64,
    entropy: Option<EntropySpread>,
    entropy_hist: Box<[u32]>,
    topk_mass: Option<f64>,
    noise_kl: Option<f64>,
    #[serde(default)]
    noise_js: Option<f64>,
    #[serde(default)]
    agreement: Option<f64>,
    #[serde(default)]
    merge_rate: Option<f64>,
    latency_s: f64,
    started_at: f64,
    peak_device_bytes: Option<u64>,
    peak_rss_bytes: Option<u64>,
    batch_size: u32,
}

/// The facts every row of a file shares.
#[derive(Clone, PartialEq)]
struct Head {
    experiment: String,
    suite: String,
    bench: String,
    config_hash: String,
    deterministic: bool,
}

impl Head {
    fn of(line: &Line<'_>) -> Self {
        Self {
            experiment: line.experiment.to_string(),
            suite: line.suite.to_string(),
            bench: line.bench.to_string(),
            config_hash: line.config_hash.to_string(),
            deterministic: line.deterministic,
        }
    }

    fn fits(&self, line: &Line<'_>) -> bool {
        self.experiment == line.experiment
            && self.config_hash == line.config_hash
            && self.suite == line.suite
            && self.bench == line.bench
            && self.deterministic == line.deterministic
    }

    fn mixed(&self, other: &Self, file: &Path) -> FoldError {
        let show = |d: bool| if d { "deterministic" } else { "random" }.to_owned();
        let fields = [
            (
                "experiment",
                self.experiment.clone(),
                other.experiment.clone(),
            ),
            ("suite", self.suite.clone(), other.suite.clone()),
            ("bench", self.bench.clone(), other.bench.clone()),
            (
                "config_hash",
                self.config_hash.clone(),
                other.config_hash.clone(),
            ),
            ("draws", show(self.deterministic), show(other.deterministic)),
        ];
        let (field, a, b) = fields
            .into_iter()
            .find(|(_, a, b)| a != b)
            .unwrap_or_default();
        // Which thread came first must not show.
        let (first, second) = if a <= b { (a, b) } else { (b, a) };
        FoldError::Mixed {
            file: file.to_owned(),
            field,
            first,
            second,
        }
    }
}

/// Reads one raw file. A torn last line is a warning; any other line that is no row is an error.
///
/// # Errors
/// [`FoldError`], the first by position in the file, whatever the number of threads.
pub fn read_cell(file: &Path) -> Result<CellRows, FoldError> {
    read_cell_in_chunks(file, CHUNK_BYTES)
}

/// [`read_cell`] with another chunk size; the result does not depend on it.
///
/// # Errors
/// [`FoldError`].
pub fn read_cell_in_chunks(file: &Path, chunk: u64) -> Result<CellRows, FoldError> {
    // Every row repeats the facts of its file; only those that differ from the first row's are kept.
    let first: OnceLock<Head> = OnceLock::new();
    let parse = |bytes: &[u8]| -> serde_json::Result<(Option<Box<Head>>, Slim)> {
        let line: Line<'_> = from_line(bytes)?;
        let head = first.get_or_init(|| Head::of(&line));
        let other = (!head.fits(&line)).then(|| Box::new(Head::of(&line)));
        Ok((other, slim(line)))
    };
    let mut rows: Vec<(usize, Slim)> = Vec::new();
    let warnings = for_each_chunk(file, chunk, &parse, |parsed| {
        for (other, row) in parsed {
            if let (Some(other), Some(head)) = (other, first.get()) {
                return Err(head.mixed(&other, file));
            }
            rows.push((rows.len(), row));
        }
        Ok(())
    })?;
    let Some(head) = first.into_inner() else {
        return Err(FoldError::Empty {
            file: file.to_owned(),
        });
    };
    Ok(CellRows {
        experiment: head.experiment,
        suite: head.suite,
        bench: head.bench,
        config_hash: head.config_hash,
        deterministic: head.deterministic,
        rows: last_of_each(rows),
        warnings,
    })
}

/// Every whole line of a file as a `T`, in order, with the warnings of [`read_cell`].
///
/// # Errors
/// [`FoldError::Read`] and [`FoldError::Malformed`].
pub fn read_rows<T: DeserializeOwned + Send>(
    file: &Path,
    keep: impl Fn(T) -> T + Sync,
) -> Result<(Vec<T>, Vec<String>), FoldError> {
    let parse = |bytes: &[u8]| from_line(bytes).map(&keep);
    let mut rows = Vec::new();
    let warnings = for_each_chunk(file, CHUNK_BYTES, &parse, |parsed| {
        rows.extend(parsed);
        Ok(())
    })?;
    Ok((rows, warnings))
}

fn slim(line: Line<'_>) -> Slim {
    let mut hasher = DefaultHasher::new();
    line.text.hash(&mut hasher);
    line.latent_steps.hash(&mut hasher);
    line.switches.hash(&mut hasher);
    line.entropy.map(|e| e.mean.to_bits()).hash(&mut hasher);
    Slim {
        output: hasher.finish(),
        item: line.item_id.into(),
        seed: line.seed,
        sample: line.sample,
        correct: line.correct,
        correct_flexible: line.correct_flexible,
        failure: line.failure,
        explicit_tokens: line.explicit_tokens,
        injected_tokens: line.injected_tokens,
        latent_steps: line.latent_steps,
        latent_segments: line.latent_segments,
        switches: line.switches,
        handoffs: line.handoffs,
        handoff_bytes: line.handoff_bytes,
        prompt_tokens: line.prompt_tokens,
        forward_tokens: line.forward_tokens,
        uplink_bytes: line.uplink_bytes,
        downlink_bytes: line.downlink_bytes,
        entropy: line.entropy,
        entropy_hist: line.entropy_hist,
        topk_mass: line.topk_mass,
        noise_kl: line.noise_kl,
        noise_js: line.noise_js,
        agreement: line.agreement,
        merge_rate: line.merge_rate,
        latency_s: line.latency_s,
        started_at: line.started_at,
        peak_device_bytes: line.peak_device_bytes,
        peak_rss_bytes: line.peak_rss_bytes,
        batch_size: line.batch_size,
    }
}

/// Numbered rows sorted by key; of those of one key the last survives. In place: these rows are most of what an
/// aggregation holds.
fn last_of_each(mut rows: Vec<(usize, Slim)>) -> Vec<Slim> {
    rows.par_sort_unstable_by(|(i, a), (j, b)| a.key().cmp(&b.key()).then(i.cmp(j)));
    rows.dedup_by(|(_, later), (_, kept)| {
        let same = later.key() == kept.key();
        if same {
            std::mem::swap(later, kept);
        }
        same
    });
    rows.into_iter().map(|(_, row)| row).collect()
}

/// A line's value. UTF-8 is checked once for all of it: for every string anew takes longer.
fn from_line<'de, T: Deserialize<'de>>(line: &'de [u8]) -> serde_json::Result<T> {
    match std::str::from_utf8(line) {
        Ok(text) => serde_json::from_str(text),
        // The parser says where.
        Err(_) => serde_json::from_slice(line),
    }
}

type Parser<'a, T> = dyn Fn(&[u8]) -> serde_json::Result<T> + Sync + 'a;

/// What one chunk held: its values, or where and why it stopped.
struct Chunk<T> {
    values: Vec<T>,
    error: Option<(u64, Vec<u8>, serde_json::Error)>,
    torn: Option<usize>,
}

fn for_each_chunk<T: Send>(
    file: &Path,
    chunk: u64,
    parse: &Parser<'_, T>,
    mut take: impl FnMut(Vec<T>) -> Result<(), FoldError>,
) -> Result<Vec<String>, FoldError> {
    let read = |source| FoldError::Read {
        file: file.to_owned(),
        source,
    };
    let ranges = line_ranges(file, chunk.max(1)).map_err(read)?;
    let mut warnings = Vec::new();
    for ranges in ranges.chunks(AHEAD * rayon::current_num_threads()) {
        let parsed: Vec<std::io::Result<Chunk<T>>> = ranges
            .into_par_iter()
            .map(|range| parse_range(file, range.clone(), parse))
            .collect();
        for chunk in parsed {
            let chunk = chunk.map_err(read)?;
            take(chunk.values)?;
            if let Some((offset, line, error)) = chunk.error {
                let before = count_line_ends(file, offset).map_err(read)?;
                return Err(malformed(file, 1 + before, &line, &error));
            }
            if let Some(bytes) = chunk.torn {
                warnings.push(format!(
                    "{}: the last line is torn ({bytes} bytes) and was not read; resuming the run repairs it",
                    file.display()
                ));
            }
        }
    }
    Ok(warnings)
}

fn malformed(file: &Path, number: u64, line: &[u8], error: &serde_json::Error) -> FoldError {
    let column = error.column().max(1);
    let message = bare_message(error);
    // A missing field is named by the parser, and is nowhere in the line.
    let at = match field_at(line, column) {
        Some(field) if !message.starts_with("missing field") => format!("field `{field}`: "),
        _ => String::new(),
    };
    FoldError::Malformed {
        file: file.to_owned(),
        line: number,
        column,
        at,
        message,
    }
}

/// Splits a file into ranges of about `chunk` bytes that end after a line end or at the end of the file.
fn line_ranges(path: &Path, chunk: u64) -> std::io::Result<Vec<Range<u64>>> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut ranges = Vec::new();
    let mut start = 0;
    while start < len {
        let mut end = (start + chunk).min(len);
        if end < len {
            file.seek(SeekFrom::Start(end))?;
            let mut rest = Vec::new();
            end += BufReader::new(&file).read_until(b'\n', &mut rest)? as u64;
        }
        ranges.push(start..end);
        start = end;
    }
    Ok(ranges)
}

fn parse_range<T>(
    path: &Path,
    range: Range<u64>,
    parse: &Parser<'_, T>,
) -> std::io::Result<Chunk<T>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(range.start))?;
    let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
    file.take(range.end - range.start).read_to_end(&mut bytes)?;
    let mut chunk = Chunk {
        values: Vec::new(),
        error: None,
        torn: None,
    };
    let ends = memchr::memchr_iter(b'\n', &bytes).map(|end| (end, true));
    // What follows the last line end, if anything does.
    let torn = bytes.last().is_some_and(|&last| last != b'\n');
    let mut start = 0;
    for (end, whole) in ends.chain(torn.then_some((bytes.len(), false))) {
        let line = &bytes[start..end];
        match parse(line) {
            Ok(value) => chunk.values.push(value),
            Err(error) if !whole && (error.is_eof() || error.is_syntax()) => {
                chunk.torn = Some(line.len());
            }
            Err(error) => {
                chunk.error = Some((range.start + start as u64, line.to_vec(), error));
                break;
            }
        }
        start = end + 1;
    }
    Ok(chunk)
}

fn count_line_ends(path: &Path, before: u64) -> std::io::Result<u64> {
    let mut reader = BufReader::new(File::open(path)?.take(before));
    let mut ends = 0;
    while reader.skip_until(b'\n')? > 0 {
        ends += 1;
    }
    Ok(ends)
}

/// The key of the outermost object whose value holds `column` (from 1) of `line`.
fn field_at(line: &[u8], column: usize) -> Option<String> {
    let mut depth = 0usize;
    let mut key = None;
    let mut text: Option<usize> = None;
    let mut last_text: Option<Range<usize>> = None;
    let mut escaped = false;
    for (at, byte) in line.iter().enumerate().take(column) {
        if let Some(start) = text {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    last_text = Some(start..at);
                    text = None;
                }
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => text = Some(at + 1),
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            b':' if depth == 1 => key = last_text.take(),
            b',' if depth == 1 => key = None,
            _ => {}
        }
    }
    key.map(|range| String::from_utf8_lossy(&line[range]).into_owned())
}

/// The parser's message without the position, which counts within one line.
pub(crate) fn bare_message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// Index of rows by item: ranges of a vector sorted by item.
pub(crate) fn by_item(rows: &[Slim]) -> HashMap<&str, &[Slim]> {
    rows.chunk_by(|a, b| a.item == b.item)
        .map(|group| (&*group[0].item, group))
        .collect()
}
