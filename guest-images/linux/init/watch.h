// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// What the machine waits for, said when nothing has come of a check for long.
#pragma once

// Starts a process that looks, when no result has been reported for `twostage.watch` seconds (60), at what is under
// way: interrupts, requests of disks, tasks that wait. Once. 0 seconds: never.
void watch_results(void);

// A result has been reported.
void result_reported(void);
