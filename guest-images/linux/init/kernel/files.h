// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Small files in /proc and /sys.
#pragma once

#include <stdbool.h>
#include <stddef.h>

// The first line of a file, without the newline; "" if it cannot be read. The path is a printf
// format. The result is valid until the eighth call after this one.
const char *first_line(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Writes text to a file. 0, or errno.
int write_text(const char *path, const char *text);

// The last component of a symbolic link's target; "" if there is none. Otherwise as first_line.
const char *link_name(const char *format, ...) __attribute__((format(printf, 1, 2)));

bool exists(const char *path);

// Calls `each` with the names in a directory, sorted, until it returns false.
void for_each_name(const char *directory, bool (*each)(const char *name, void *context), void *context);

// Time limit of a wait in seconds, generous for a busy machine.
enum { PATIENCE_S = 60 };

// Waits until a condition holds. False if it does not within PATIENCE_S.
bool wait_until(bool (*holds)(const void *context), const void *context);

// Seconds of the monotonic clock.
double now(void);
