// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The source of a PCI Express transaction: Requester ID and PASID; and responses to page requests.
//!
//! Source: PCI Express Base Specification 6.0, §2.2.4.2 (Requester ID), §6.20 (PASID) and §10.4.2.2
//! (Page Request Group Response).

use std::fmt;
use std::str::FromStr;

/// A Requester ID: bus (bits 15:8), device (7:3) and function (2:0) of a PCI function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Bdf(u16);

impl Bdf {
    /// The Requester ID of `bus`:`device`.`function`; `None` if `device` > 31 or `function` > 7.
    pub const fn new(bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > 31 || function > 7 {
            return None;
        }
        Some(Self((bus as u16) << 8 | (device as u16) << 3 | function as u16))
    }

    /// The Requester ID as in a transaction, a fault record or a source-id field.
    pub const fn from_raw(raw: u16) -> Self {
        Self(raw)
    }

    /// The 16 bits of the Requester ID.
    pub const fn raw(self) -> u16 {
        self.0
    }

    /// Bus number.
    pub const fn bus(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// Device number, 0 to 31.
    pub const fn device(self) -> u8 {
        (self.0 >> 3) as u8 & 0x1f
    }

    /// Function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 as u8 & 0x7
    }

    /// Device and function in one byte, the index of a root entry's context table.
    pub const fn devfn(self) -> u8 {
        self.0 as u8
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus(), self.device(), self.function())
    }
}

impl fmt::Debug for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is not `bus:device.function`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a PCI address; write bus:device.function in hexadecimal, such as 00:04.0")]
pub struct ParseBdfError(String);

impl FromStr for Bdf {
    type Err = ParseBdfError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (bus, rest) = text.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            // `from_str_radix` would accept a sign.
            let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                true => u8::from_str_radix(text, 16).ok(),
                false => None,
            };
            Self::new(number(bus)?, number(device)?, number(function)?)
        };
        parse().ok_or_else(|| ParseBdfError(text.to_owned()))
    }
}

/// A Process Address Space ID: 20 bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Pasid(u32);

impl Pasid {
    /// Width of a PASID in bits (PCIe 6.0 §6.20).
    pub const BITS: u32 = 20;

    /// The PASID `value`; `None` if it needs more than 20 bits.
    pub const fn new(value: u32) -> Option<Self> {
        if value >> Self::BITS != 0 {
            return None;
        }
        Some(Self(value))
    }

    /// The 20 bits of the PASID.
    pub const fn raw(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Pasid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Pasid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pasid({:#x})", self.0)
    }
}

/// The response to a group of page requests (PCIe 6.0 §10.4.2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageResponse {
    /// 0: the device may try again. It finds out then whether it has the pages.
    Success,
    /// 1: the device cannot have one of the pages.
    InvalidRequest,
    /// 15: there is an error that repeats; the device makes no requests until it is reset.
    Failure,
}

impl PageResponse {
    /// Decodes the four bits of a response code; reserved ones mean a failure.
    pub const fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Success,
            1 => Self::InvalidRequest,
            _ => Self::Failure,
        }
    }

    /// The four bits of the code.
    pub const fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::InvalidRequest => 1,
            Self::Failure => 15,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bdf_packs_as_the_specification_says() {
        let bdf = Bdf::new(0x12, 0x1f, 7).unwrap();
        assert_eq!(bdf.raw(), 0x12ff);
        assert_eq!((bdf.bus(), bdf.device(), bdf.function()), (0x12, 0x1f, 7));
        assert_eq!(bdf.to_string(), "12:1f.7");
        assert_eq!("12:1f.7".parse::<Bdf>().unwrap(), bdf);
        assert_eq!(Bdf::new(0, 32, 0), None);
        assert_eq!(Bdf::new(0, 0, 8), None);
    }

    #[test]
    fn text_that_is_no_address_is_refused_by_name() {
        for text in
            ["+0:04.0", "00:+4.0", "00:04.+0", "", "00", "00:04", "0:20.0", "00:04.8", "zz:04.0"]
        {
            let error = text.parse::<Bdf>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")), "{error}");
        }
    }

    #[test]
    fn pasid_has_20_bits() {
        assert_eq!(Pasid::new(0xf_ffff).unwrap().raw(), 0xf_ffff);
        assert_eq!(Pasid::new(0x10_0000), None);
    }

    #[test]
    fn reserved_codes_are_failures() {
        for code in 0..16 {
            let response = PageResponse::from_code(code);
            assert_eq!(response.code(), if code < 2 { code } else { 15 });
        }
    }
}
