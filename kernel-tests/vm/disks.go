package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// addDisk adds the image of a disk, which is a file that exists.
func (m *machine) addDisk(name string) error {
	if _, err := os.Stat(name); err != nil {
		return err
	}
	name, err := pathForQemu(name)
	m.disks = append(m.disks, name)
	return err
}

// logWrites makes an empty log for the writes of the first disk. Without -log-writes it
// does nothing.
func (m *machine) logWrites() (err error) {
	if m.writes == "" {
		return nil
	}
	if len(m.disks) == 0 {
		return errors.New("-log-writes needs a -disk")
	}
	if m.writes, err = pathForQemu(m.writes); err != nil {
		return err
	}
	return os.WriteFile(m.writes, nil, 0o600)
}

func pathForQemu(name string) (string, error) {
	if strings.ContainsAny(name, ",\n") {
		return "", fmt.Errorf("%s cannot be a disk: QEMU takes a comma for the end of a path", name)
	}
	return filepath.Abs(name)
}

// furtherDisks are QEMU's options for the disks that the user named. The host's own disk is
// never flushed: a power cut of the guest is none of the host.
func (m *machine) furtherDisks() (args []string) {
	for i, name := range m.disks {
		node := fmt.Sprintf("disk%d", i)
		args = append(args, "-blockdev", "driver=file,cache.no-flush=on,node-name="+node+",filename="+name)
		if i == 0 && m.writes != "" {
			args = append(args,
				"-blockdev", "driver=file,cache.no-flush=on,node-name=writes,filename="+m.writes,
				"-blockdev", "driver=blklogwrites,node-name=logged,file="+node+",log=writes,log-super-update-interval=1")
			node = "logged"
		}
		// Zeroes have to come as data: QEMU 7.2 logs a request for them in two steps, and
		// another request's entry may come between.
		args = append(args, "-device", "virtio-blk-pci,discard=off,write-zeroes=off,drive="+node)
	}
	return args
}
