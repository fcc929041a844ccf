// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Machine code for 32-bit protected mode, for the guests of tests.
#![allow(dead_code)]

/// Writes `byte` to I/O port `port`.
pub fn out(port: u16, byte: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    // mov $port, %dx; mov $byte, %al; out %al, (%dx)
    vec![0x66, 0xba, low, high, 0xb0, byte, 0xee]
}

/// Writes `text` to the serial port.
pub fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
}

/// Ends the machine with `value`.
pub fn exit(value: u8) -> Vec<u8> {
    out(0xf4, value)
}

/// Writes `value` to memory at `address`.
pub fn store(address: u32, value: u32) -> Vec<u8> {
    // movl $value, address
    [&[0xc7, 0x05][..], &address.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// Waits until these bits in memory at `address` are zero.
pub fn wait_for_zero(address: u32, bits: u32) -> Vec<u8> {
    // 1: testl $bits, address; jnz 1b
    [&[0xf7, 0x05][..], &address.to_le_bytes(), &bits.to_le_bytes(), &[0x75, 0xf4]].concat()
}

/// Repeats `body`, which must not change ECX.
pub fn repeat(times: u32, body: &[Vec<u8>]) -> Vec<u8> {
    let body = body.concat();
    // mov $times, %ecx; 1: body; dec %ecx; jnz 1b
    let back = 0u8.wrapping_sub(body.len() as u8 + 3);
    [&[0xb9][..], &times.to_le_bytes(), &body, &[0x49, 0x75, back]].concat()
}

/// A fault with no interrupt table: lidt of six zeros after the code, then ud2.
pub fn triple_fault() -> Vec<u8> {
    let zeros = (super::images::CODE_START + 0x100).to_le_bytes();
    [&[0x0f, 0x01, 0x1d][..], &zeros, &[0x0f, 0x0b]].concat()
}

/// Jumps to where no memory is.
pub fn jump_to_nowhere() -> Vec<u8> {
    // mov $0x40000000, %eax; jmp *%eax
    vec![0xb8, 0, 0, 0, 0x40, 0xff, 0xe0]
}

/// hlt, forever.
pub const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// Writes so many blocks of 4096 bytes to the serial port: memory from the images' load address.
pub fn flood(blocks: u32) -> Vec<u8> {
    let start = super::images::CODE_START.to_le_bytes();
    // mov $0x3f8, %dx; mov $blocks, %ebx; 1: mov $start, %esi; mov $4096, %ecx; rep outsb; dec
    // %ebx; jnz 1b
    let port = [0x66, 0xba, 0xf8, 0x03, 0xbb];
    let block = [0xb9, 0, 0x10, 0, 0, 0xf3, 0x6e, 0x4b, 0x75, 0xf1];
    [&port[..], &blocks.to_le_bytes(), &[0xbe], &start, &block].concat()
}

/// Echoes the serial port's input, forever.
pub const ECHO: [u8; 17] = [
    // 1: mov $0x3fd, %dx; 2: in (%dx), %al; test $1, %al; jz 2b
    0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, //
    // mov $0x3f8, %dx; in (%dx), %al; out %al, (%dx); jmp 1b
    0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xef,
];
