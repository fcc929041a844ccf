// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Image formats other than raw, recognized by the first bytes of the file.

/// Offset of the magic, the magic, and `qemu-img`'s name of the format. Only magics that a raw disk
/// does not have by accident.
const MARKS: [(usize, &[u8], &str); 9] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
];

/// The format of an image that starts with `head`, if it is known and not raw.
pub(super) fn of(head: &[u8]) -> Option<&'static str> {
    let has = |at: usize, mark| head.get(at..).is_some_and(|rest| rest.starts_with(mark));
    MARKS.iter().find(|(at, mark, _)| has(*at, mark)).map(|(_, _, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_their_marks_alone() {
        for (at, mark, name) in MARKS {
            let mut head = vec![0; 512];
            head[at..at + mark.len()].copy_from_slice(mark);
            assert_eq!(of(&head), Some(name));
            head.insert(0, 0);
            assert_eq!(of(&head), None, "{name}, a byte further");
            assert_eq!(of(&mark[..mark.len() - 1]), None);
        }
        assert_eq!(of(&[]), None);
        // An MBR.
        let mut head = vec![0; 512];
        head[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(of(&head), None);
    }
}
