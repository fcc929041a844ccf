// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The test program's options on the kernel's command line: words of the form twostage.NAME=VALUE.
#pragma once

#include <stdbool.h>

// The value of twostage.NAME, or `otherwise`.
const char *option(const char *name, const char *otherwise);
unsigned long option_number(const char *name, unsigned long otherwise);

// Whether any word of the command line is exactly this.
bool on_command_line(const char *word);
