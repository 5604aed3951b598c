//! `doctor`: what this machine has, what is missing, and what to install for what.

use std::fmt::Write as _;
use std::io::Write;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::build;
use crate::host::{Host, HostError};
use crate::status::{CliError, ExitStatus};

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// One JSON object.
    #[arg(long)]
    pub json: bool,
}

/// What the Python package reports. Everything may be absent: the report is wanted most where things are broken.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Report {
    /// Version by library; null where it is not there.
    versions: Map<String, Value>,
    cpu: Cpu,
    memory: Memory,
    /// What each device can do.
    devices: Vec<DeviceReport>,
    data: Data,
    /// What is not there and not needed.
    missing: Vec<Missing>,
    /// What is needed and broken, a line each.
    problems: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cpu {
    name: String,
    physical_cores: Option<u32>,
    logical_cores: Option<u32>,
    torch_threads: Option<u32>,
    run_threads: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Memory {
    total_bytes: Option<u64>,
    available_bytes: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DeviceReport {
    /// As `--device` names it.
    device: String,
    name: String,
    total_bytes: Option<u64>,
    free_bytes: Option<u64>,
    /// Null where a product came out right, else what went wrong, by dtype.
    dtypes: Map<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Data {
    benches: Vec<BenchData>,
    experts: Vec<ExpertData>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BenchData {
    name: String,
    rows: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ExpertData {
    name: String,
    bytes: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Missing {
    what: String,
    r#for: String,
    how: String,
}

pub(crate) fn command(
    args: &DoctorArgs,
    host: &mut dyn Host,
    out: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let report = match host.doctor() {
        Ok(value) => Some(value),
        Err(HostError::NeedsPython(_)) => None,
        Err(error) => return Err(error.into()),
    };
    if args.json {
        let value = json!({ "build": build::json(), "cores": cores, "python": report });
        let text =
            serde_json::to_string_pretty(&value).map_err(|e| CliError::Failed(e.to_string()))?;
        writeln!(out, "{text}")?;
    }
    let parsed: Option<Report> = match report {
        Some(value) => Some(
            serde_json::from_value(value)
                .map_err(|e| CliError::Failed(format!("the Python package's report: {e}")))?,
        ),
        None => None,
    };
    let problems = parsed.as_ref().map_or(0, |report| report.problems.len());
    if !args.json {
        let facts = build::FACTS.map(|(name, value)| (name.to_owned(), value.to_owned()));
        section(out, "build", &facts)?;
        if let Some(report) = &parsed {
            show(report, out)?;
        } else {
            section(out, "machine", &[("cores".to_owned(), cores.to_string())])?;
            writeln!(
                out,
                "libraries, devices and data: use the doctor of the Python package"
            )?;
        }
    }
    Ok(if problems == 0 {
        ExitStatus::Success
    } else {
        ExitStatus::Failure
    })
}

/// A headed block of names and values, the values aligned.
fn section(out: &mut dyn Write, title: &str, rows: &[(String, String)]) -> Result<(), CliError> {
    writeln!(out, "{title}")?;
    let width = rows
        .iter()
        .map(|(name, _)| name.chars().count())
        .max()
        .unwrap_or(0);
    for (name, value) in rows {
        writeln!(out, "  {}", format!("{name:<width$}  {value}").trim_end())?;
    }
    writeln!(out)?;
    Ok(())
}

fn size(bytes: Option<u64>) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let Some(bytes) = bytes else {
        return "unknown".into();
    };
    let mut value = bytes as f64 / 1024.0;
    let mut unit = UNITS[0];
    for larger in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    format!("{value:.1} {unit}")
}

fn count(value: Option<u32>) -> String {
    value.map_or_else(|| "unknown".into(), |n| n.to_string())
}

fn show(report: &Report, out: &mut dyn Write) -> Result<(), CliError> {
    let row = |name: &str, value: String| (name.to_owned(), value);
    let versions: Vec<(String, String)> = report
        .versions
        .iter()
        .map(|(name, version)| row(name, version.as_str().unwrap_or("not installed").into()))
        .collect();
    section(out, "libraries", &versions)?;
    let cpu = &report.cpu;
    section(
        out,
        "machine",
        &[
            row("processor", cpu.name.clone()),
            row(
                "cores",
                format!(
                    "{} physical, {} logical",
                    count(cpu.physical_cores),
                    count(cpu.logical_cores)
                ),
            ),
            row(
                "threads",
                format!(
                    "{} in a run, {} as torch starts",
                    count(cpu.run_threads),
                    count(cpu.torch_threads)
                ),
            ),
            row(
                "memory",
                format!(
                    "{}, {} available",
                    size(report.memory.total_bytes),
                    size(report.memory.available_bytes)
                ),
            ),
        ],
    )?;
    let devices: Vec<(String, String)> = report
        .devices
        .iter()
        .map(|device| row(&device.device, describe(device)))
        .collect();
    section(out, "devices", &devices)?;
    let rows = |n: Option<u64>| n.map_or_else(|| "not there".into(), |n| format!("{n} rows"));
    let data: Vec<(String, String)> = report
        .data
        .benches
        .iter()
        .map(|bench| row(&bench.name, rows(bench.rows)))
        .chain(report.data.experts.iter().map(|expert| {
            let bytes = expert.bytes;
            row(
                &expert.name,
                bytes.map_or_else(|| "not there".into(), |_| size(bytes)),
            )
        }))
        .collect();
    section(out, "data", &data)?;
    let missing: Vec<(String, String)> = report
        .missing
        .iter()
        .map(|m| row(&m.what, format!("for {}: {}", m.r#for, m.how)))
        .collect();
    if !missing.is_empty() {
        section(out, "missing, not needed for all", &missing)?;
    }
    if report.problems.is_empty() {
        writeln!(out, "everything needed is there")?;
    } else {
        writeln!(out, "problems")?;
        for problem in &report.problems {
            writeln!(out, "  {problem}")?;
        }
    }
    Ok(())
}

fn describe(device: &DeviceReport) -> String {
    let mut text = device.name.clone();
    if device.total_bytes.is_some() {
        let _ = write!(
            text,
            ", {} ({} free)",
            size(device.total_bytes),
            size(device.free_bytes)
        );
    }
    let (good, bad): (Vec<_>, Vec<_>) =
        device.dtypes.iter().partition(|(_, error)| error.is_null());
    let names: Vec<&str> = good.iter().map(|(name, _)| name.as_str()).collect();
    let works = if names.is_empty() {
        "nothing".to_owned()
    } else {
        names.join(" ")
    };
    let _ = write!(text, "; computes {works}");
    for (name, error) in bad {
        let _ = write!(text, "; not {name}: {}", error.as_str().unwrap_or("fails"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_aligned_sections() {
        let value = json!({
            "versions": {"python": "3.11.9", "torch": "2.15.0", "polars": null},
            "cpu": {"name": "A processor", "physical_cores": 8, "logical_cores": 16, "torch_threads": 8, "run_threads": 8},
            "memory": {"total_bytes": 68_719_476_736_u64, "available_bytes": 1_610_612_736},
            "devices": [
                {"device": "cpu", "name": "A processor", "dtypes": {"fp32": null, "bf16": null, "fp16": "no kernel"}},
                {"device": "cuda", "name": "A GPU", "total_bytes": 17_179_869_184_u64, "free_bytes": 8_589_934_592_u64, "dtypes": {"bf16": null}},
            ],
            "data": {"benches": [{"name": "tinygsm", "rows": 500}], "experts": [{"name": "zoo:tiny-math", "bytes": 1_782_579}, {"name": "zoo:tiny-code", "bytes": null}]},
            "missing": [{"what": "polars", "for": "read_run", "how": "pip install polars"}],
            "problems": ["torch 2.15.0 is broken"],
            "something": "newer",
        });
        let report: Report = serde_json::from_value(value).unwrap();
        let mut out = Vec::new();
        show(&report, &mut out).unwrap();
        insta::assert_snapshot!(String::from_utf8(out).unwrap());
    }

    #[test]
    fn an_empty_report_is_no_error() {
        let mut out = Vec::new();
        let report: Report = serde_json::from_value(json!({})).unwrap();
        show(&report, &mut out).unwrap();
        assert!(String::from_utf8(out).unwrap().contains("unknown"));
    }
}
