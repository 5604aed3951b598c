//! CSV (RFC 4180, line feeds, empty fields for what is not there).

use super::Aggregate;
use super::table::{TidyRow, Value};

impl Aggregate {
    /// The long table as CSV.
    #[must_use]
    pub fn tidy_csv(&self) -> String {
        let rows: Vec<_> = self.tidy().iter().map(TidyRow::columns).collect();
        csv(&rows)
    }

    /// The wide table as CSV.
    #[must_use]
    pub fn wide_csv(&self) -> String {
        csv(&self.wide())
    }
}

fn csv(rows: &[Vec<(&'static str, Value)>]) -> String {
    let mut out = String::new();
    if let Some(first) = rows.first() {
        line(&mut out, first.iter().map(|(name, _)| (*name).to_owned()));
    }
    for row in rows {
        line(&mut out, row.iter().map(|(_, value)| field(value)));
    }
    out
}

fn line(out: &mut String, fields: impl Iterator<Item = String>) {
    out.push_str(&fields.map(|f| quoted(&f)).collect::<Vec<_>>().join(","));
    out.push('\n');
}

fn field(value: &Value) -> String {
    match value {
        Value::Text(v) => v.clone(),
        Value::Float(v) => v.map(|v| v.to_string()),
        Value::Count(v) => v.map(|v| v.to_string()),
        Value::Flag(v) => v.map(|v| v.to_string()),
    }
    .unwrap_or_default()
}

fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_where_they_must_be() {
        assert_eq!(quoted("plain"), "plain");
        assert_eq!(quoted("a,b"), "\"a,b\"");
        assert_eq!(quoted("a \"b\"\n"), "\"a \"\"b\"\"\n\"");
    }
}
