// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The guest's part of the comparison of VMMs.
#pragma once

// Measures the first disk, and prints "figure NAME VALUE" for each figure. Pauses at each "mark
// NAME", so that counters outside can be read.
void take_figures(void);
