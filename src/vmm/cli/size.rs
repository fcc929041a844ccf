// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sizes and numbers in human notation.

/// A size in bytes: decimal, or hexadecimal after `0x`, with K, M, G or T for powers of 1024.
///
/// # Errors
/// The text is no such number, or it does not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last() {
        Some('K' | 'k') => (&text[..text.len() - 1], 10),
        Some('M' | 'm') => (&text[..text.len() - 1], 20),
        Some('G' | 'g') => (&text[..text.len() - 1], 30),
        Some('T' | 't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number = parse_number(digits)
        .map_err(|_| format!("'{text}' is not a size; write bytes, or 512M, 2G"))?;
    number
        .checked_shl(shift)
        .filter(|size| size >> shift == number)
        .ok_or_else(|| format!("'{text}' does not fit 64 bits"))
}

/// A number: decimal, or hexadecimal after `0x`.
///
/// # Errors
/// The text is no such number, or it does not fit 64 bits.
pub fn parse_number(text: &str) -> Result<u64, String> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    // `from_str_radix` would accept a sign.
    if digits.starts_with('+') {
        return Err(format!("'{text}' is not a number"));
    }
    u64::from_str_radix(digits, radix).map_err(|_| format!("'{text}' is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("0x1000"), Ok(4096));
        assert_eq!(parse_size("4k"), Ok(4096));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert_eq!(parse_size("1T"), Ok(1 << 40));
        assert_eq!(parse_size("0"), Ok(0));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "M", "1.5G", "-1", "+1", "512MB", "ten", "1 G", "é"] {
            assert!(parse_size(text).unwrap_err().contains(text), "{text}");
        }
        assert!(parse_size("16777216T").unwrap_err().contains("64 bits"));
        assert!(parse_size("18446744073709551616").is_err());
    }
}
