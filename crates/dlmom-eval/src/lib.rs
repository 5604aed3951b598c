#![doc = include_str!("../README.md")]

pub mod bench;
pub mod choice;
pub mod code;
pub mod extract;
pub mod grade;
pub mod items;
pub mod json;
pub mod judge;
pub mod number;
pub mod stats;
pub mod suggest;

pub use bench::{Bench, BenchInfo, BenchSpec, BenchSpecError};
pub use choice::extract_choice;
pub use code::extract_code;
pub use extract::{EXTRACTOR_VERSION, Extraction, Method, Score, answers_equal, extract, score};
pub use grade::{Grade, grade, read};
pub use items::{Item, ItemSet, ItemsError, Schema, Task, letter, load, parse};
pub use json::{canonical_json, sha256_hex};
pub use judge::{CodeJudge, CodeRunner, JudgeError, Limits, NoJudge, Program, Verdict};
