//! A booktabs table.

use std::fmt::Write as _;

use super::{Aggregate, AggregateCell};

const COLUMNS: usize = 9;

impl Aggregate {
    /// One `tabular` with a block for every run and suite; needs the package `booktabs`.
    ///
    /// Accuracies are per cent with Wilson's 95 % interval. An accuracy is bold only where it beats the reference at 5 % after
    /// Holm's adjustment.
    #[must_use]
    pub fn latex(&self) -> String {
        let mut out = String::from(
            "\\begin{tabular}{lrrrrrrrr}\n\\toprule\n\
             Cell & Accuracy [95\\,\\%] & Flexible & $\\Delta$ REF & $p$ (Holm) & Steps & Latent \\% & Switches & s/sample \\\\\n",
        );
        let mut block: Option<(&str, &str)> = None;
        for cell in &self.cells {
            let here = (cell.run.as_str(), cell.suite.as_str());
            if block != Some(here) {
                out.push_str("\\midrule\n");
                if block.is_none_or(|(run, _)| run != here.0) {
                    let bench = cell.summary.as_ref().map_or("", |s| s.bench.as_str());
                    let title = escape(&format!("{} {bench}", cell.run));
                    let _ = writeln!(
                        out,
                        "\\multicolumn{{{COLUMNS}}}{{l}}{{\\emph{{{}}}}} \\\\",
                        title.trim_end()
                    );
                }
                block = Some(here);
            }
            out.push_str(&line(cell));
        }
        out.push_str("\\bottomrule\n\\end{tabular}\n");
        out
    }
}

fn line(cell: &AggregateCell) -> String {
    let mut name = escape(&cell.experiment);
    if let Some(of) = &cell.alias_of {
        let _ = write!(name, " (= {})", escape(of));
    }
    let Some(s) = &cell.summary else {
        let reason = escape(cell.skipped.as_deref().unwrap_or_default());
        let rest = COLUMNS - 1;
        return format!("{name} & \\multicolumn{{{rest}}}{{l}}{{skipped: {reason}}} \\\\\n");
    };
    let versus = s.versus_ref.map(|v| v.strict);
    let p = versus.and_then(|v| v.p_adjusted);
    let mut accuracy = format!("{:.1}", 100.0 * s.accuracy.value);
    if versus.is_some_and(|v| v.delta > 0.0) && p.is_some_and(|p| p < 0.05) {
        accuracy = format!("\\textbf{{{accuracy}}}");
    }
    let ci = s.accuracy.ci;
    let dash = || "--".to_owned();
    let fields = [
        name,
        format!("{accuracy} [{:.1}, {:.1}]", 100.0 * ci.lo, 100.0 * ci.hi),
        format!("{:.1}", 100.0 * s.accuracy_flexible.value),
        versus.map_or_else(dash, |v| format!("{:+.1}", 100.0 * v.delta)),
        p.map_or_else(dash, |p| {
            if p < 0.001 {
                "$<$0.001".to_owned()
            } else {
                format!("{p:.3}")
            }
        }),
        format!("{:.1}", s.total_steps.value),
        s.latent_coverage
            .map_or_else(dash, |c| format!("{:.1}", 100.0 * c)),
        format!("{:.1}", s.switches_mean.value),
        format!("{:.2}", s.latency_mean_s.value),
    ];
    fields.join(" & ") + " \\\\\n"
}

/// Text with every character that LaTeX reads otherwise escaped.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => {
                out.push('\\');
                out.push(c);
            }
            '~' => out.push_str("\\textasciitilde{}"),
            '^' => out.push_str("\\textasciicircum{}"),
            '\\' => out.push_str("\\textbackslash{}"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_special_character_is_escaped() {
        assert_eq!(
            escape(r"a_b & 50% {$#} ~^\"),
            r"a\_b \& 50\% \{\$\#\} \textasciitilde{}\textasciicircum{}\textbackslash{}"
        );
    }
}
