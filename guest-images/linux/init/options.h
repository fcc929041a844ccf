// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// What the kernel's command line asks of the test program: words of the form twostage.NAME=VALUE.
#pragma once

#include <stdbool.h>

// The value of twostage.NAME, or `otherwise`.
const char *option(const char *name, const char *otherwise);
unsigned long option_number(const char *name, unsigned long otherwise);

// Whether a word of the command line, whatever it is for, is exactly this.
bool on_command_line(const char *word);
