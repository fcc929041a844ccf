// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// What the comparison of virtual machine monitors measures in the guest.
#pragma once

// Measures the first disk, and says "figure NAME VALUE" for each figure. At each "mark NAME" it pauses,
// so that counters outside can be read.
void take_figures(void);
