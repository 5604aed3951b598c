#![doc = include_str!("../README.md")]

pub mod bench;
pub mod extract;
pub mod items;
pub mod json;
pub mod number;
pub mod stats;
pub mod suggest;

pub use bench::{Bench, BenchSpec, BenchSpecError};
pub use extract::{EXTRACTOR_VERSION, Extraction, Method, Score, answers_equal, extract, score};
pub use items::{Item, ItemSet, ItemsError, load_gsm8k, parse_gsm8k};
pub use json::{canonical_json, sha256_hex};
