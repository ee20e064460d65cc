package services

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/kernel-tests/debian"
)

// sector is what loop devices have, in bytes.
const sector = 512

// Disk makes a block device with a partition table as `sgdisk` writes it, in which the files
// of dir, called by 64 hex digits, are partitions in nydus's way: the first half of the
// digits is the partition's name, the second its GUID.
func Disk(t testing.TB, dir string) (device string) {
	t.Helper()
	sgdisk := need(t, debian.Sgdisk)
	disk := filepath.Join(scratch(t), "disk")
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var args []string
	blobs := map[int64]string{} // by offset
	end := int64(1 << 20)
	for i, name := range names {
		st, err := name.Info()
		if err != nil {
			t.Fatal(err)
		}
		sectors := (st.Size() + sector - 1) / sector
		hex := name.Name()
		guid := strings.Join([]string{hex[32:40], hex[40:44], hex[44:48], hex[48:52], hex[52:]}, "-")
		args = append(args,
			fmt.Sprintf("--new=%d:%d:+%d", i+1, end/sector, sectors-1), fmt.Sprintf("--change-name=%d:%s", i+1, hex[:32]),
			fmt.Sprintf("--partition-guid=%d:%s", i+1, guid))
		blobs[end] = filepath.Join(dir, hex)
		end = (end + sectors*sector + 1<<20 - 1) &^ (1<<20 - 1)
	}
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off, name := range blobs {
		p, err := os.ReadFile(name)
		if err == nil {
			_, err = f.WriteAt(p, off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(end + 1<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(sgdisk, append(args, disk)...).CombinedOutput(); err != nil {
		t.Fatalf("sgdisk: %v\n%s", err, out)
	}
	out, err := exec.Command("losetup", "--find", "--show", "--read-only", disk).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	device = strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", device, err, out)
		}
	})
	return device
}
