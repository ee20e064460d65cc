package blobmgr

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"strings"
)

// runningName is the file of a cache directory that is in use: magic, the boot id of the
// machine and a SHA-256. An orderly end removes it. No blob can be called so.
const runningName = ",running"

const runningMagic = "erofsd cache running 1\n"

// begin says durably that d is in use since this boot of the machine. If it was in use
// when the machine went down, all clean marks are taken away: what they list was durable,
// but whoever loses power may lose more than what was not written yet, and verifying
// is what finds out. The page cache is d.cold then: what can be read is on the disk.
func (d *directory) begin(boot string, log *slog.Logger) error {
	if err := d.removeAll(tmpSuffix); err != nil {
		return err
	}
	p := d.read(runningName, 1<<10)
	if content, err := unseal(p, runningMagic); d.exists(runningName) && (err != nil || !bytes.Equal(content, []byte(boot))) {
		if err := d.removeMarks(); err != nil {
			return fmt.Errorf("doubt what is in it after the machine went down: %w", err)
		}
		d.cold.Store(true)
		log.Warn("the machine went down while the cache was in use; everything in it is verified before it is read", "dir", d.f.Name())
	}
	if err := d.write(runningName, seal(append([]byte(runningMagic), boot...)), true); err != nil {
		// A full disk: nothing can be filled, but what is there can be read.
		log.Warn("cannot note that the cache is in use; if the machine goes down now the cache is believed as after an orderly end", "err", err)
		return d.remove(runningName)
	}
	return nil
}

// end says that d is in order.
func (d *directory) end() error { return d.remove(runningName) }

// removeMarks durably removes all clean marks.
func (d *directory) removeMarks() error {
	if err := d.removeAll(cleanSuffix); err != nil {
		return err
	}
	return d.sys.sync()
}

// removeAll removes the files whose names end in suffix.
func (d *directory) removeAll(suffix string) error {
	names, err := d.names(suffix)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := d.remove(name + suffix); err != nil {
			return err
		}
	}
	return nil
}

// bootID identifies this boot of the machine; empty when the kernel does not tell.
func bootID() string {
	p, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(p))
}
