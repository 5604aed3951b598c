//! Numbers in prose and LaTeX as exact rationals.

use std::fmt;

/// An exact number. Equal values compare equal however they were written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Number {
    /// Reduced fraction, `den > 0`.
    Ratio {
        /// Numerator, with the sign.
        num: i128,
        /// Denominator.
        den: i128,
    },
    /// A decimal beyond 128 bits: digits without leading or trailing zeros.
    Digits {
        /// Whether it is below zero.
        negative: bool,
        /// Before the point.
        integer: String,
        /// After the point.
        fraction: String,
    },
}

impl Number {
    /// The number that `text` is, white space around it and one trailing full stop aside; `None` if there is anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let (number, len) = scan(text)?;
        matches!(&text[len..], "" | ".").then_some(number)
    }

    fn ratio(num: i128, den: i128) -> Option<Self> {
        if den == 0 {
            return None;
        }
        let divisor = i128::try_from(gcd(num.unsigned_abs(), den.unsigned_abs())).ok()?;
        let sign = den.signum();
        Some(Self::Ratio {
            num: (num / divisor).checked_mul(sign)?,
            den: (den / divisor).abs(),
        })
    }

    fn decimal(integer: &str, fraction: &str) -> Self {
        let integer = integer.trim_start_matches('0');
        let fraction = fraction.trim_end_matches('0');
        let exact = || {
            let den = 10i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
            let num: i128 = format!("0{integer}{fraction}").parse().ok()?;
            Self::ratio(num, den)
        };
        exact().unwrap_or_else(|| Self::Digits {
            negative: false,
            integer: integer.to_owned(),
            fraction: fraction.to_owned(),
        })
    }

    fn negate(self) -> Self {
        match self {
            Self::Ratio { num, den } => Self::Ratio { num: -num, den },
            Self::Digits {
                negative,
                integer,
                fraction,
            } => Self::Digits {
                negative: !negative,
                integer,
                fraction,
            },
        }
    }

    fn plus(&self, other: &Self) -> Option<Self> {
        match (self, other) {
            (Self::Ratio { num: a, den: b }, Self::Ratio { num: c, den: d }) => Self::ratio(
                a.checked_mul(*d)?.checked_add(c.checked_mul(*b)?)?,
                b.checked_mul(*d)?,
            ),
            _ => None,
        }
    }
}

/// The canonical form: an integer, a finite decimal without trailing zeros, else `p/q`.
impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ratio { num, den: 1 } => write!(f, "{num}"),
            Self::Ratio { num, den } => match decimal_digits(*num, *den) {
                Some((digits, places)) => {
                    let sign = if *num < 0 { "-" } else { "" };
                    let padded = format!("{digits:0>width$}", width = places + 1);
                    let (integer, fraction) = padded.split_at(padded.len() - places);
                    write!(f, "{sign}{integer}.{fraction}")
                }
                None => write!(f, "{num}/{den}"),
            },
            Self::Digits {
                negative,
                integer,
                fraction,
            } => {
                let sign = if *negative { "-" } else { "" };
                let integer = if integer.is_empty() { "0" } else { integer };
                let point = if fraction.is_empty() { "" } else { "." };
                write!(f, "{sign}{integer}{point}{fraction}")
            }
        }
    }
}

/// `|num/den|` scaled to an integer with as many decimal places as it needs, where finitely many do.
fn decimal_digits(num: i128, den: i128) -> Option<(u128, usize)> {
    let (mut rest, mut twos, mut fives) = (den, 0u32, 0u32);
    while rest % 2 == 0 {
        rest /= 2;
        twos += 1;
    }
    while rest % 5 == 0 {
        rest /= 5;
        fives += 1;
    }
    if rest != 1 {
        return None;
    }
    let places = twos.max(fives);
    let scale = 2u128
        .checked_pow(places - twos)?
        .checked_mul(5u128.checked_pow(places - fives)?)?;
    Some((num.unsigned_abs().checked_mul(scale)?, places as usize))
}

fn gcd(a: u128, b: u128) -> u128 {
    if b == 0 { a.max(1) } else { gcd(b, a % b) }
}

/// The number `text` starts with and its length in bytes: sign, currency, thousands separators, decimals, fractions, mixed
/// numbers, `\frac`, a percent sign. A full stop after it is not part of it.
#[must_use]
pub fn scan(text: &str) -> Option<(Number, usize)> {
    let mut at = 0;
    let mut sign = None;
    let mut currency = false;
    loop {
        let rest = &text[at..];
        if sign.is_none()
            && let Some((negative, len)) = sign_prefix(rest)
        {
            sign = Some(negative);
            at += len;
        } else if !currency && let Some(len) = currency_prefix(rest) {
            currency = true;
            at += len;
        } else {
            break;
        }
    }
    let (number, len) = scan_unsigned(&text[at..])?;
    at += len;
    let percent = [r"\%", " %", r" \%", "%"]
        .iter()
        .find(|p| text[at..].starts_with(**p));
    at += percent.map_or(0, |p| p.len());
    Some((
        if sign == Some(true) {
            number.negate()
        } else {
            number
        },
        at,
    ))
}

fn sign_prefix(text: &str) -> Option<(bool, usize)> {
    match text.chars().next()? {
        c @ ('-' | '\u{2212}') => Some((true, c.len_utf8())),
        '+' => Some((false, 1)),
        _ => None,
    }
}

fn currency_prefix(text: &str) -> Option<usize> {
    let symbol = [r"\$", "$", "€", "£"]
        .into_iter()
        .find(|s| text.starts_with(*s))?;
    let space = usize::from(text[symbol.len()..].starts_with(' '));
    Some(symbol.len() + space)
}

fn scan_unsigned(text: &str) -> Option<(Number, usize)> {
    if let Some(found) = latex_fraction(text) {
        return Some(found);
    }
    let (integer, mut at) = scan_integer(text);
    let fraction = text[at..].strip_prefix('.').map_or("", leading_digits);
    if integer.is_empty() && fraction.is_empty() {
        return None;
    }
    if !fraction.is_empty() {
        at += 1 + fraction.len();
        return Some((Number::decimal(&integer, fraction), at));
    }
    let whole = Number::decimal(&integer, "");
    if let Some((number, len)) = slash_fraction(&integer, &text[at..]) {
        return Some((number, at + len));
    }
    if let Some((part, len)) = mixed_part(&text[at..])
        && let Some(sum) = whole.plus(&part)
    {
        return Some((sum, at + len));
    }
    Some((whole, at))
}

/// Digits with thousands separators (`,`, and LaTeX's `{,}`, `,\!`, `\,`) removed, and the bytes they took.
fn scan_integer(text: &str) -> (String, usize) {
    let first = leading_digits(text);
    let mut digits = first.to_owned();
    let mut at = first.len();
    if first.is_empty() || first.len() > 3 {
        return (digits, at);
    }
    while let Some(separator) = ["{,}", ",\\!", "\\,", ","]
        .into_iter()
        .find(|s| text[at..].starts_with(*s))
    {
        let group = leading_digits(&text[at + separator.len()..]);
        if group.len() != 3 {
            break;
        }
        digits.push_str(group);
        at += separator.len() + group.len();
    }
    (digits, at)
}

/// `/q` after the integer `p`; a second slash makes it a date, not a fraction.
fn slash_fraction(integer: &str, rest: &str) -> Option<(Number, usize)> {
    let den = leading_digits(rest.strip_prefix('/')?);
    if den.is_empty() || rest[1 + den.len()..].starts_with('/') {
        return None;
    }
    let number = Number::ratio(integer.parse().ok()?, den.parse().ok()?)?;
    Some((number, 1 + den.len()))
}

/// The fraction of a mixed number: ` 1/2`, ` \frac{1}{2}` or `\frac12`.
fn mixed_part(rest: &str) -> Option<(Number, usize)> {
    let space = usize::from(rest.starts_with(' '));
    if let Some((number, len)) = latex_fraction(&rest[space..]) {
        return Some((number, space + len));
    }
    if space == 0 {
        return None;
    }
    let num = leading_digits(&rest[1..]);
    let (number, len) = slash_fraction(num, &rest[1 + num.len()..])?;
    match number {
        Number::Ratio { num: p, den: q } if p > 0 && p < q => Some((number, 1 + num.len() + len)),
        _ => None,
    }
}

/// `\frac{p}{q}`, `\dfrac12`, ...
fn latex_fraction(text: &str) -> Option<(Number, usize)> {
    let name = [r"\frac", r"\dfrac", r"\tfrac"]
        .into_iter()
        .find(|n| text.starts_with(*n))?;
    let (num, first) = latex_argument(&text[name.len()..])?;
    let (den, second) = latex_argument(&text[name.len() + first..])?;
    Some((Number::ratio(num, den)?, name.len() + first + second))
}

fn latex_argument(text: &str) -> Option<(i128, usize)> {
    let trimmed = text.trim_start_matches(' ');
    let space = text.len() - trimmed.len();
    if let Some(braced) = trimmed.strip_prefix('{') {
        let end = braced.find('}')?;
        let body = braced[..end]
            .trim()
            .replace(',', "")
            .replace('\u{2212}', "-");
        return Some((body.parse().ok()?, space + end + 2));
    }
    let digit = trimmed.chars().next()?.to_digit(10)?;
    Some((i128::from(digit), space + 1))
}

fn leading_digits(text: &str) -> &str {
    let end = text
        .bytes()
        .position(|b| !b.is_ascii_digit())
        .unwrap_or(text.len());
    &text[..end]
}

/// Every number in prose, left to right: value and byte range. Numbers glued to letters on their left, clock times (`5:00`),
/// dates (`3/4/2020`), ordinals (`5th`) and minus signs that subtract are not read as such.
#[must_use]
pub fn find_numbers(text: &str) -> Vec<(Number, std::ops::Range<usize>)> {
    let mut found = Vec::new();
    let mut at = 0;
    let mut before: Option<char> = None;
    while let Some(here) = text[at..].chars().next() {
        let glued = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
        let signed = sign_prefix(&text[at..]).is_some();
        let subtracts = signed && before.is_some_and(|c| c.is_alphanumeric() || c == ')');
        let candidate = (!glued && !subtracts).then(|| scan(&text[at..])).flatten();
        if let Some((number, len)) = candidate {
            let end = at + len;
            if let Some(skip) = no_quantity(&text[end..]) {
                at = end + skip;
            } else {
                found.push((number, at..end));
                at = end;
            }
            before = text[..at].chars().next_back();
        } else {
            before = Some(here);
            at += here.len_utf8();
        }
    }
    found
}

/// Bytes to skip where what follows a number makes it a clock time, a date or an ordinal.
fn no_quantity(rest: &str) -> Option<usize> {
    if let Some(date) = date_tail(rest) {
        return Some(date);
    }
    if let Some(after) = rest.strip_prefix(':') {
        let digits = leading_digits(after);
        if !digits.is_empty() {
            let here = 1 + digits.len();
            return Some(here + no_quantity(&rest[here..]).unwrap_or(0));
        }
    }
    let ordinal = ["st", "nd", "rd", "th"]
        .into_iter()
        .find(|o| rest.starts_with(*o))?;
    let boundary = !rest[ordinal.len()..].starts_with(char::is_alphanumeric);
    boundary.then_some(ordinal.len())
}

/// Length of `/4/2020` after a number.
fn date_tail(rest: &str) -> Option<usize> {
    let month = leading_digits(rest.strip_prefix('/')?).len();
    let year = leading_digits(rest[1 + month..].strip_prefix('/')?).len();
    (month > 0 && year > 0).then_some(2 + month + year)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canonical(text: &str) -> Option<String> {
        Number::parse(text).map(|n| n.to_string())
    }

    #[test]
    fn numbers_have_one_canonical_form() {
        for (text, expected) in [
            ("18", "18"),
            ("033", "33"),
            ("-0", "0"),
            ("+7.", "7"),
            ("18.00", "18"),
            ("$18.50", "18.5"),
            (r"\$2,125", "2125"),
            ("-$5", "-5"),
            ("$-5", "-5"),
            ("\u{2212}3", "-3"),
            (".5", "0.5"),
            ("50%", "50"),
            (r"50\%", "50"),
            ("1 1/2", "1.5"),
            ("-1 1/2", "-1.5"),
            ("1/3", "1/3"),
            ("4/2", "2"),
            (r"\frac{1}{2}", "0.5"),
            (r"\dfrac12", "0.5"),
            (r"2\frac{1}{3}", "7/3"),
            (r"10,\!080", "10080"),
            ("10{,}080", "10080"),
            ("1,234,567.890", "1234567.89"),
            ("0.1", "0.1"),
        ] {
            assert_eq!(canonical(text).as_deref(), Some(expected), "{text}");
        }
        for text in [
            "", "x", "1,2", "(1,2)", "1-2", "1/0", "2x", "1 2", "--1", "$", "1.2.3",
        ] {
            assert_eq!(canonical(text), None, "{text}");
        }
    }

    #[test]
    fn digits_beyond_128_bits_compare_exactly() {
        let long = "9".repeat(60);
        assert_eq!(canonical(&long).as_deref(), Some(long.as_str()));
        assert_eq!(
            Number::parse(&format!("00{long}.000")),
            Number::parse(&long)
        );
        assert_ne!(Number::parse(&format!("{long}.1")), Number::parse(&long));
        assert_eq!(
            canonical(&format!("-{long}.10")),
            Some(format!("-{long}.1"))
        );
    }

    #[test]
    fn prose_numbers_are_found_where_a_reader_would() {
        let all = |text: &str| -> Vec<String> {
            find_numbers(text)
                .into_iter()
                .map(|(n, _)| n.to_string())
                .collect()
        };
        assert_eq!(all("10-5 = 5, so -5 or (3)"), ["10", "5", "5", "-5", "3"]);
        assert_eq!(all("from 1:00 PM to 12:30:15, 8 left"), ["8"]);
        assert_eq!(all("the 5th of 3/4/2020, x2, A4"), [""; 0]);
        assert_eq!(all("Rs.500 and 1,2 and 2,125!"), ["500", "1", "2", "2125"]);
        assert_eq!(all("€ 5.5."), ["5.5"]);
        assert_eq!(all("über 3 Äpfel − 4"), ["3", "4"]);
    }

    proptest! {
        #[test]
        fn scanning_never_panics_and_ranges_hold_the_number(text in "\\PC{0,40}|[-0-9.,/$ %\\\\frac{}:]{0,30}") {
            for (number, range) in find_numbers(&text) {
                prop_assert_eq!(scan(&text[range]).map(|(n, _)| n), Some(number));
            }
        }

        #[test]
        fn canonical_forms_read_back_as_the_same_number(num in -10_000_000i64..10_000_000, den in 1i64..5000) {
            let number = Number::ratio(i128::from(num), i128::from(den)).unwrap();
            prop_assert_eq!(Number::parse(&number.to_string()), Some(number));
        }
    }
}
