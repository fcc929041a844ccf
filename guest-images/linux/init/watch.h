// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Prints what the machine waits for when a check has printed nothing for long.
#pragma once

// Starts a process that prints, once, when no result has been reported for `twostage.watch` seconds
// (60), what is in progress: interrupts, disk requests, blocked tasks. 0 seconds: never.
void watch_results(void);

// A result has been reported.
void result_reported(void);
