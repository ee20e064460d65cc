// Package systemd has tests that run erofsd under this machine's systemd, with the units of
// configs/systemd as they are shipped: systemd as the first process of a machine of its own
// (namespaces for processes, mounts and cgroups), and the kernel below it, with fanotify.
package systemd
