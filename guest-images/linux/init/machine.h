// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// What is particular to an architecture's machine: one file for each.
#pragma once

// Ends the machine with this status, if it has a device for that; returns if not.
void exit_machine(unsigned char status);
