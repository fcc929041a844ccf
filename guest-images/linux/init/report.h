// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// What the test program says: one line a result, and a summary.
#pragma once

// "ok CHECK: ..." and the like; the text is printf's.
void passed(const char *check, const char *format, ...) __attribute__((format(printf, 2, 3)));
void failed(const char *check, const char *format, ...) __attribute__((format(printf, 2, 3)));
void skipped(const char *check, const char *format, ...) __attribute__((format(printf, 2, 3)));

// "# ...": what is good to know.
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

// Waits until all of it is out: a machine that ends takes with it what the console has not written.
void flush_report(void);

// "N passed, M failed, K skipped". How many failed.
unsigned summary(void);
