//! What differs between two recorded configurations, field by field.

use std::fmt;

use serde_json::Value;

/// One field that differs.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldDiff {
    /// Where: `context.models[0].dtype`.
    pub path: String,
    /// What the folder says; `None` where it has no such field.
    pub recorded: Option<Value>,
    /// What this run says; `None` where it has no such field.
    pub current: Option<Value>,
}

impl fmt::Display for FieldDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |value: &Option<Value>| match value {
            Some(value) => value.to_string(),
            None => "(absent)".to_owned(),
        };
        write!(
            f,
            "{}: recorded {}, now {}",
            self.path,
            show(&self.recorded),
            show(&self.current)
        )
    }
}

/// The differing leaves of two values, in the recorded order, then what is new.
#[must_use]
pub fn diff(path: &str, recorded: &Value, current: &Value) -> Vec<FieldDiff> {
    let mut found = Vec::new();
    walk(path, Some(recorded), Some(current), &mut found);
    found
}

fn walk(path: &str, recorded: Option<&Value>, current: Option<&Value>, found: &mut Vec<FieldDiff>) {
    match (recorded, current) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let new = b.keys().filter(|key| !a.contains_key(*key));
            for key in a.keys().chain(new) {
                let inner = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                walk(&inner, a.get(key), b.get(key), found);
            }
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) => {
            for i in 0..a.len().max(b.len()) {
                walk(&format!("{path}[{i}]"), a.get(i), b.get(i), found);
            }
        }
        (a, b) if a == b => {}
        (a, b) => found.push(FieldDiff {
            path: path.to_owned(),
            recorded: a.cloned(),
            current: b.cloned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_differing_leaves_are_named() {
        let a =
            json!({"k": 50, "models": [{"dtype": "bf16"}], "gone": 1, "same": [1, {"x": null}]});
        let b = json!({"k": 10, "models": [{"dtype": "fp32"}, 2], "same": [1, {"x": null}], "new": true});
        let said: Vec<String> = diff("", &a, &b).iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "k: recorded 50, now 10",
                "models[0].dtype: recorded \"bf16\", now \"fp32\"",
                "models[1]: recorded (absent), now 2",
                "gone: recorded 1, now (absent)",
                "new: recorded (absent), now true",
            ]
        );
        assert!(diff("", &a, &a).is_empty());
    }
}
