package cachefiles_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/testenv"
)

// childEnv makes the test binary a child: whoever mounts must not have the device,
// and a reader that is to be killed must not be the test.
const childEnv = "EROFSD_CACHEFILES_CHILD"

func TestMain(m *testing.M) {
	if job := os.Getenv(childEnv); job != "" {
		if err := child(job); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	testenv.Main(m)
}

// child mounts, or reads the first page of a file.
func child(job string) error {
	var o erofs.MountOptions
	if err := json.NewDecoder(bufio.NewReader(os.Stdin)).Decode(&o); err != nil {
		return err
	}
	if job == "mount" {
		return erofs.Mount(o)
	}
	f, err := os.Open(o.Source)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(f, make([]byte, page))
	return err
}
