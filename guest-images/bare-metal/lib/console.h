// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Text on the first serial port, and the way out: `print` is here, the rest each guest has itself.
#pragma once
#include "lib/types.h"

void console_init(void);
void put_char(char c);

// Understands %s %c %u (u32) %x (u32) %lx (u64), and a zero-padded width such as %02x.
__attribute__((format(printf, 1, 2))) void print(const char *format, ...);
void print_list(const char *format, va_list arguments);

// Ends the machine: 0 when all went well, 1 otherwise.
__attribute__((noreturn)) void machine_exit(u8 code);
