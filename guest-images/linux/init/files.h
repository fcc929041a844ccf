// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Small files of /proc and /sys.
#pragma once

#include <stdbool.h>
#include <stddef.h>

// The first line of a file, without its end; "" if it cannot be read. The path is printf's. What
// is returned stays as it is until the eighth call after this one.
const char *first_line(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Writes text to a file. 0, or errno.
int write_text(const char *path, const char *text);

// The last component of what a symbolic link names; "" if there is none. As first_line otherwise.
const char *link_name(const char *format, ...) __attribute__((format(printf, 1, 2)));

bool exists(const char *path);

// Calls `each` with the names in a directory, sorted, until it returns false.
void for_each_name(const char *directory, bool (*each)(const char *name, void *context), void *context);

// Seconds that a check waits for what must come: a machine with much else to do keeps them, too.
enum { PATIENCE_S = 60 };

// Waits until a condition holds. False if it did not within PATIENCE_S.
bool wait_until(bool (*holds)(const void *context), const void *context);

// Seconds of the monotonic clock.
double now(void);
