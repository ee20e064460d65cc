package daemon

import (
	"log/slog"
	"syscall"
)

// wantFiles is the number of descriptors that a busy node needs: one for each
// blob and each read that waits.
const wantFiles = 1 << 20

// RaiseFileLimit asks for enough file descriptors. A refusal is no end: reads
// beyond the limit wait in the kernel's queue.
func RaiseFileLimit(log *slog.Logger) {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil || l.Cur >= wantFiles {
		return
	}
	want := syscall.Rlimit{Cur: wantFiles, Max: max(l.Max, wantFiles)}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &want); err != nil {
		log.Warn("cannot raise the limit of file descriptors; many blobs or waiting reads may reach it (set LimitNOFILE)",
			"limit", l.Cur, "wanted", wantFiles, "err", err)
	}
}
