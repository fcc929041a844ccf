// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MAC addresses of network devices.

use std::fmt;
use std::str::FromStr;

/// A unicast MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// A locally administered address for device `number` of a machine.
    pub fn local(number: u8) -> Self {
        Self([0x02, 0x74, 0x73, 0x00, 0x00, number])
    }
}

/// Not a unicast MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a MAC address of one device, such as 02:00:00:00:00:01")]
pub struct NoMac;

impl FromStr for MacAddress {
    type Err = NoMac;

    fn from_str(text: &str) -> Result<Self, NoMac> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(NoMac)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| NoMac)?;
        }
        // The lowest bit of the first byte marks group addresses.
        let one_device = bytes[0] & 1 == 0 && bytes != [0; 6];
        match parts.next() {
            None if one_device => Ok(Self(bytes)),
            _ => Err(NoMac),
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_of_one_device() {
        let mac: MacAddress = "02:00:5e:10:00:fF".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:5e:10:00:ff");
        assert_eq!(mac.to_string().parse(), Ok(mac));
        assert_eq!(MacAddress::local(7).to_string().parse(), Ok(MacAddress::local(7)));
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "01:00:00:00:00:01",
            "00:00:00:00:00:00",
            "2:00:00:00:00:01",
            "02-00-00-00-00-01",
            "+2:00:00:00:00:01x",
        ] {
            assert_eq!(bad.parse::<MacAddress>(), Err(NoMac), "{bad}");
        }
    }
}
