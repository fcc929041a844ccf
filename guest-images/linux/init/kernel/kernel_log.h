// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The kernel's log.
#pragma once

// Calls `each` for every line that contains one of `needles` (the last is NULL), without its time.
// Returns their number.
unsigned log_lines(const char *const *needles, void (*each)(const char *line));

// Number of lines that contain `needle`.
unsigned log_count(const char *needle);
