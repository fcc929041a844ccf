// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The guest's part of the comparison of VMMs.
#pragma once

// Both print "figure NAME VALUE" for each figure. The first measures the first disk, the second what
// a program that has a device takes to map and unmap.
void take_figures(void);
void take_vfio_figures(void);

// Prints "mark NAME", and pauses, so that counters outside can be read.
void mark(const char *name);
