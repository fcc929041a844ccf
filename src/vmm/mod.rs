//! Stand-in until the machine lands.
