// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Output of the test program: one line per result, and a summary.
#pragma once

// "ok CHECK: ..." and similar; the text is a printf format.
void passed(const char *check, const char *format, ...) __attribute__((format(printf, 2, 3)));
void failed(const char *check, const char *format, ...) __attribute__((format(printf, 2, 3)));
void skipped(const char *check, const char *format, ...) __attribute__((format(printf, 2, 3)));

// "# ...": additional information.
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Waits until all output is written: the end of the machine discards what the console has not
// written.
void flush_report(void);

// "N passed, M failed, K skipped". Returns the number of failures.
unsigned summary(void);
